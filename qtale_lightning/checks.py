"""What a run's configuration is refused for before anything expensive starts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qtale_lightning.schedule import Schedule

# Trainer's options that are the suite's own: a value that it keeps anyway, and what to use instead.
OWNED: dict[str, tuple[tuple[Any, ...], str]] = {
    "default_root_dir": ((None,), "a run's folder is below --out"),
    "val_check_interval": ((None,), "--validations N spreads N of them evenly over training"),
    "check_val_every_n_epoch": ((1, None), "--validations N spreads N of them evenly over training"),
    "use_distributed_sampler": ((True,), "batches are cut for every rank by the data module"),
    "enable_checkpointing": (
        (None, True),
        "the best checkpoint is what is exported, the last what is resumed from",
    ),
    "fast_dev_run": (
        (False, 0),
        "it keeps no checkpoint to export. For a quick look at everything: --trainer.max_steps 2 "
        "--data.limit_train 100 --data.limit_validation 20 --out FOLDER",
    ),
    "barebones": ((False,), "it keeps no checkpoint to export, and no log to report"),
    "overfit_batches": ((0.0, 0), "give --data.limit_train ROWS: rows that no training is validated on"),
    "limit_test_batches": ((None, 1.0), "nothing is tested by the trainer: --data.limit_validation ROWS"),
    "limit_predict_batches": ((None, 1.0), "nothing is predicted by the trainer"),
    "reload_dataloaders_every_n_epochs": ((0,), "every epoch has its own order already"),
    "model_registry": ((None,), "`<run>/model` is what to publish"),
}


def check_trainer(options: Mapping[str, Any], validations: int) -> None:
    """Refuse options of the Trainer that can't work, or that the suite sets itself.

    Args:
        options: ``--trainer.*``, as parsed.
        validations: ``--validations``.

    Raises:
        ValueError: The message names the option, and what to do.
    """
    for name, (kept, instead) in OWNED.items():
        if (value := options.get(name)) not in kept:
            raise ValueError(f"--trainer.{name} {value} is the suite's own: {instead}")
    steps, epochs = options["max_steps"], options["max_epochs"]
    for name, value in (("max_steps", steps), ("max_epochs", epochs)):
        if value is not None and value < 1 and value != -1:
            raise ValueError(
                f"--trainer.{name} {value} trains nothing: give --trainer.max_steps, or -1 and --trainer.max_epochs"
            )
    if steps == -1 and epochs in (None, -1):
        raise ValueError(
            "training has no end, which the learning rate's schedule needs: give --trainer.max_steps or "
            "--trainer.max_epochs"
        )
    for name, what in (
        ("accumulate_grad_batches", "the micro-batches of an optimizer step"),
        ("num_nodes", "machines"),
    ):
        if options[name] < 1:
            raise ValueError(f"--trainer.{name} {options[name]} must be at least 1: {what}")
    clip = options["gradient_clip_val"]
    if clip is not None and not 0 <= clip < math.inf:
        raise ValueError(f"--trainer.gradient_clip_val {clip} must be a number of 0 (no clipping) or more")
    for name in ("limit_train_batches", "limit_val_batches"):
        limit = options[name]
        if limit is not None and not (limit > 0 if isinstance(limit, int) else 0 < limit <= 1):
            raise ValueError(f"--trainer.{name} {limit} must be a number of batches, or a share in (0, 1]")


def schedule(options: Mapping[str, Any], batches: int) -> Schedule:
    """The length of a training.

    Args:
        options: ``--trainer.*``, checked.
        batches: Of one device, in an epoch of the whole data.
    """
    return Schedule(
        limited(options, "limit_train_batches", batches),
        options["accumulate_grad_batches"],
        options["max_steps"],
        options["max_epochs"],
    )


def limited(options: Mapping[str, Any], name: str, batches: int) -> int:
    """Batches that a limit of the Trainer leaves (ValueError: none)."""
    limit = 1.0 if options[name] is None else options[name]
    left = min(limit, batches) if isinstance(limit, int) else int(limit * batches)
    if left < 1:
        raise ValueError(f"--trainer.{name} {limit} leaves none of {batches} batches: give a larger share")
    return left


def check_calibration(sequences: Sequence[Sequence[int]], reserved: int, needed: int) -> None:
    """Refuse rows that are too few to quantize on: a layer that routers always skip sees the reserved tokens alone.

    Args:
        sequences: Token ids that will be calibrated on.
        reserved: Tokens of a sequence that execute every layer.
        needed: Tokens that a search needs.

    Raises:
        ValueError: With what to change.
    """
    seen = sum(min(len(sequence), reserved) for sequence in sequences)
    if seen < needed:
        raise ValueError(
            f"quantization would calibrate a layer that routers always skip on {seen} tokens of {len(sequences)} "
            f"training rows, but the search needs {needed}: give more rows (--data.limit_train, --quantize.sequences), "
            "or an engine that looks at none"
        )
