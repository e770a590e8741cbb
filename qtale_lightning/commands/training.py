"""The commands that start from a configuration: ``fit``, ``plan`` and ``doctor``."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from qtale_lightning import errors
from qtale_lightning.commands.parser import PROG
from qtale_lightning.values import UserPath

# Importing PyTorch, Lightning and transformers takes seconds: every command imports what it needs when it runs.
if TYPE_CHECKING:
    from qtale_lightning.cli import QTALECLI


def fit(options: tuple[str, ...]) -> None:
    """Train, then export, quantize, measure each precision, choose θ and report.

    The same command resumes a run that was interrupted, and repeats nothing that is there.
    """
    from qtale_lightning.cli import QTALECLI

    cli = QTALECLI(options, f"{PROG} fit")
    cli.check()
    cli.check_training()
    cli.pin_base()
    cli.check_base()
    with cli.run.locked("fit"):
        _fit(cli, options)


def _fit(cli: QTALECLI, options: tuple[str, ...]) -> None:
    """What `fit` does in the run's directory."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from qtale_lightning.checkpoints import resume_point
    from qtale_lightning.locks import is_helper
    from qtale_lightning.models.sources import source_name
    from qtale_lightning.precision import remark
    from qtale_lightning.results import update_results
    from qtale_lightning.results.metadata import run_metadata
    from qtale_lightning.results.origin import origin
    from qtale_lightning.results.store import load_or_new
    from qtale_lightning.yaml_files import plain_yaml

    run, data = cli.run, cli.prepare_data()
    cli.check_rows()
    cli.prepare_method()
    checkpoint = cli.config["ckpt_path"]
    if checkpoint in (None, "last"):
        found = resume_point(run) or (run.last if checkpoint else None)
        checkpoint = found and str(found)
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise FileNotFoundError(
            f"nothing to resume from: {checkpoint} isn't there. Leave --ckpt_path out to start."
        )
    trainer = cli.make_trainer()
    made_from = origin(plain_yaml(cli.config_text())) | {"rows": data.digests()}
    known = load_or_new(run.root).get("run", {}).get("made_from")
    first = not is_helper()
    (run.claim if first else run.check_claim)(cli.config_text(), made_from, known)
    command = f"{PROG} fit {shlex.join(options)}"
    seed = cli.model.seed
    source = source_name(cli.model.name, cli.model.path, cli.model.revision)
    metadata = run_metadata(cli.model.name, cli.model.method, data.label, seed, command, source)
    precision = str(cli.config["trainer"]["precision"])
    if first:
        update_results(run.root, "run", metadata | {"precision": precision, "made_from": made_from})
        run.list_logs()
    if said := remark(precision, cli.config["trainer"]["accelerator"], cli.precision_origin):
        errors.say(said)
    if checkpoint is not None:
        errors.say(f"resuming from {checkpoint}")
    cli.start_logging(trainer)
    try:
        trainer.fit(cli.model, cli.datamodule, ckpt_path=checkpoint, weights_only=True)
    except SIGTERMException:  # Lightning's own exit status for it is 0, and a scheduler requeues what failed
        errors.say(f"stopped by SIGTERM; the same command resumes from {run.last}")
        raise SystemExit(128 + signal.SIGTERM) from None
    except SystemExit:  # how Lightning ends a run that Ctrl-C has stopped
        raise KeyboardInterrupt from None
    if first:
        run.list_logs()


def plan(options: tuple[str, ...]) -> None:
    """What fit would cost, without loading weights."""
    from qtale_lightning.configuration import PlannedRun
    from qtale_lightning.plan import print_plan

    run = PlannedRun(options, f"{PROG} plan")
    run.check()
    run.check_training()
    print_plan(run)


def doctor(
    options: tuple[str, ...],
    model: str | None = None,
    out: UserPath = UserPath("outputs"),  # noqa: B008 (a str)
) -> int:
    """What this machine has of what is needed, and what a model would lack here.

    It ends with status 1 where something is missing.

    Args:
        model: A model of experiments/models: its weights, memory and rows, too.
        out: Folder of the runs.
    """
    from qtale_lightning.doctor import examine

    if model is None and options:
        raise ValueError(f"{' '.join(options)}: options of a run need --model NAME")
    return examine(model, options, Path(out))
