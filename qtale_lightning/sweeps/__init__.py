"""Sweeps over hyper-parameters: W&B's files, run by W&B's agents or without a server.

`python -m qtale_lightning sweep` starts, joins and tabulates them. A sweep file's command names `trial`, which gives
every run a folder of its own, so that an agent of W&B and the local runner do the same.
"""

from qtale_lightning.sweeps.definition import SweepDefinition, read_sweep
from qtale_lightning.sweeps.trial import Trial

__all__ = ["SweepDefinition", "Trial", "read_sweep"]
