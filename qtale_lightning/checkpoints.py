"""How a checkpoint gets to the disk and back: whole or not at all, listed in the run's manifest, and finite."""

import logging
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from qtale_lightning.files import replacing
from qtale_lightning.finite import check_finite
from qtale_lightning.manifest import DamagedFileError, verify, writing
from qtale_lightning.run import RunDirectory

log = logging.getLogger(__name__)


class RunCheckpointIO(TorchCheckpointIO):
    """Lightning's way of saving, beside the file that is replaced instead of in the system's temporary folder.

    Args:
        root: The run's folder, whose manifest lists checkpoints.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Replace a checkpoint; what was there stays until the new one is on the disk.

        Raises:
            NonFiniteError: A weight isn't finite.
            OSError: It couldn't be written; the error names the file.
        """
        path = Path(path)
        check_finite(
            checkpoint["state_dict"].items(),
            f"{path} isn't written, and what was saved before stays. Start the same command again to go on from "
            "there, with a lower --model.lr or --trainer.precision 32-true in a new run if it happens again.",
        )
        listed = writing(self.root, path) if path.is_relative_to(self.root) else replacing(path)
        with (
            listed as temporary,
            temporary.open("wb") as file,
        ):  # PyTorch's own file wouldn't say what went wrong
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Tensors and plain values only, whatever was asked."""
        return read_checkpoint(path, map_location)


def read_checkpoint(path: str | Path, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """What a checkpoint holds: tensors and plain values, never code.

    Raises:
        FileNotFoundError: There is none.
        DamagedFileError: It isn't a checkpoint, or a part of one.
    """
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
        checkpoint["state_dict"]
    except (RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DamagedFileError(
            f"{path} is no whole checkpoint ({reason}): remove it. The run then goes on from the one before, where "
            "there is one, or trains again"
        ) from error
    return dict(checkpoint)


def resume_point(run: RunDirectory) -> Path | None:
    """The checkpoint that an interrupted run goes on from: the newest that is whole. None: it starts anew.

    Raises:
        DamagedFileError: There are some, and none is whole.
        FileNotFoundError: They are gone, though the model that was trained is there.
    """
    damage = None
    for path in (run.last, run.previous):
        if path.is_file():
            try:
                return verify(run.root, path, _train_again(run))
            except DamagedFileError as error:
                damage = damage or error
                log.warning("%s isn't what this run wrote: it isn't used", path)
    if damage is not None:
        raise damage
    if run.model().is_dir():
        raise FileNotFoundError(
            f"{run.model()} was trained, but {run.last} is gone, so that training would start anew. What comes after "
            f"it needs no checkpoint: `python -m qtale_lightning quantize|thresholds|report {run.root}`. To train "
            "anew, move that run away, or give another folder (OUT=… of make, --out)."
        )
    return None


def require_best(run: RunDirectory, step: int) -> Path:
    """The best checkpoint, which the newest one says was saved at a step.

    Raises:
        DamagedFileError: It is missing, or isn't what the run wrote.
    """
    if not run.best.is_file():
        raise DamagedFileError(f"{run.best}, of step {step}, is missing: {_train_again(run)}")
    return verify(run.root, run.best, _train_again(run))


def exported_weights(run: RunDirectory) -> dict[str, Any]:
    """Trainable weights of the best checkpoint, by name; of the newest, where no validation has chosen one.

    Raises:
        DamagedFileError: What is to be exported is missing, or isn't what the run wrote.
    """
    if run.best.is_file():
        checkpoint = read_checkpoint(require_best(run, 0))
    elif (last := resume_point(run)) is None:
        raise DamagedFileError(f"{run.best.parent} has no checkpoint to export: {_train_again(run)}")
    else:
        checkpoint = read_checkpoint(last)
        step = checkpoint.get("callbacks", {}).get("Checkpoints", {}).get("best_step")
        if step is not None:
            require_best(run, step)
        log.warning("no validation has chosen a checkpoint: %s is exported", last)
    return dict(checkpoint["state_dict"])


def _train_again(run: RunDirectory) -> str:
    return f"remove {run.best.parent}, and the same command trains again"
