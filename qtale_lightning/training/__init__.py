"""Tools for training a routed model, each off by default, each one option of ``--model``; see experiments/README.md.

Those that are an idea of their own have a file here. The others are a line where they belong: the ratio budget of a
sequence (`losses.ratio_loss`), the routers' initial bias (`routing.router`), and keys and values that are kept
(`models.routed_layer`).
"""

from qtale_lightning.training.constraint import Multiplier
from qtale_lightning.training.distillation import Teacher, distillation_loss
from qtale_lightning.training.groups import parameter_groups
from qtale_lightning.training.noise import noise_bits, rounded_blocks
from qtale_lightning.training.stages import routed_progress, staged_rate
from qtale_lightning.training.stand_ins import fit_stand_ins

__all__ = [
    "Multiplier",
    "Teacher",
    "distillation_loss",
    "fit_stand_ins",
    "noise_bits",
    "parameter_groups",
    "rounded_blocks",
    "routed_progress",
    "staged_rate",
]
