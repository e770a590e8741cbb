"""What a run is made from, by content: the folders that its configuration names, wherever they lie now."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtale_lightning import digests, manifest
from qtale_lightning.data.readers import local_file
from qtale_lightning.settings import model_folder
from qtale_lightning.tasks import TASKS, Split, resolve_tasks

SPLITS: tuple[Split, ...] = ("train", "validation", "calibration", "dev")


def origin(config: Mapping[str, Any]) -> dict[str, str | None]:
    """Digests of what the paths of a configuration hold, known without reading a model or encoding a row.

    Args:
        config: A run's, resolved.

    Returns:
        ``base``: of the base model's folder; the path as it is, where that is no folder here but a hub's id, or gone.
        ``files``: of the tasks' files below ``data.root``, or else that path; None where no files are read.
        ``teacher``: of the model that teaches, as the base's; missing where there is none.
    """
    model = config.get("model", {})
    found = {"base": _base(model.get("path")), "files": _files(config.get("data", {}))}
    if (teacher := model.get("teacher")) is not None:
        found["teacher"] = _base(str(model_folder(teacher)))
    return found


def _base(path: str | None) -> str | None:
    folder = None if path is None else Path(path).expanduser()
    return path if folder is None or not folder.is_dir() else digests.of_base(folder)


def _files(data: Mapping[str, Any]) -> str | None:
    root = data.get("root")
    if root is None or not Path(root).expanduser().is_dir():
        return root
    tasks = [task for task in resolve_tasks(data.get("tasks", "csqa")) if TASKS[task].generate is None]
    files = {
        f"{task}/{split}": local_file(task, Path(root).expanduser(), split)
        for task in tasks
        for split in SPLITS
    }
    there = {name: manifest.digest(file) for name, file in files.items() if file.is_file()}
    return digests.of(there) if tasks else None
