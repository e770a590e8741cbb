"""A run's directory: where its parts lie, and to which configuration it belongs."""

import csv
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from qtale_lightning.checks import OWNED
from qtale_lightning.files import remove_leftovers, replacing
from qtale_lightning.locks import locked
from qtale_lightning.yaml_files import read_yaml

# Settings that may differ between two starts of the same run: where it runs, and what happens after training,
# where every piece is checked on its own.
_FREE_KEYS = {"config", "ckpt_path", "out", "wandb", "wandb_project", "validations", "sweep", "quantize"}
_FREE_TRAINER_KEYS = {
    "accelerator",
    "devices",
    "num_nodes",
    "strategy",
    "enable_progress_bar",
    "log_every_n_steps",
    *OWNED,
}


# Names of files by engine: the suite's own AWQ is the one that needs no other name.
_PREFIX = {"native": "awq", "autoawq": "autoawq", "rtn": "rtn"}


class RunDirectory:
    """``<out>/<model>-<method>-<data>-s<seed>``, and what lies in it.

    Args:
        root: The folder; made when the run is claimed.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def best(self) -> Path:
        """The best checkpoint (trainable weights only)."""
        return self.root / "checkpoints" / "best.ckpt"

    @property
    def last(self) -> Path:
        """The newest checkpoint, to resume from."""
        return self.root / "checkpoints" / "last.ckpt"

    @property
    def previous(self) -> Path:
        """The newest checkpoint but one, for when the newest is damaged."""
        return self.root / "checkpoints" / "last.previous.ckpt"

    @contextmanager
    def locked(self, command: str) -> Iterator[None]:
        """Have the directory, which is made, for one command while the block runs; what killed ones left is removed.

        Raises:
            InUseError: Another process is at work on it; the message says which.
        """
        with locked(self.root, f"python -m qtale_lightning {command}") as lock:
            if lock is not None:
                remove_leftovers(self.root)
            yield

    def model(self, bits: float = 16, engine: str = "native") -> Path:
        """The exported model at a precision, quantized by an engine below 16 bits."""
        return self.root / ("model" if bits == 16 else f"model-{_PREFIX[engine]}-{bits:g}bit")

    def search(self, bits: float, engine: str = "native") -> Path:
        """The scales and clips that an engine's search found."""
        return self.root / f"{_PREFIX[engine]}-search-{bits:g}bit.safetensors"

    def weight_bytes(self, bits: float = 16, engine: str = "native") -> int:
        """Bytes of the tensors that :meth:`model` holds on disk (the files' headers not counted)."""
        total = 0
        for file in self.model(bits, engine).glob("*.safetensors"):
            with file.open("rb") as opened:
                total += file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")
        return total

    def claim(self, text: str) -> None:
        """Take the directory for a configuration (YAML), or accept that it's already this configuration's.

        Raises:
            ValueError: Another configuration uses it; the message names what differs.
        """
        if self.config.is_file():
            differing = list(_differences(_fixed(self.config.read_text(encoding="utf-8")), _fixed(text)))
            if differing:
                shown = "; ".join(differing[:5]) + ("; …" if len(differing) > 5 else "")
                raise ValueError(
                    f"{self.root} holds a run of another configuration ({shown}). Give another folder (OUT=… of make, "
                    "--out), or move that run away."
                )
        self.root.mkdir(parents=True, exist_ok=True)
        with replacing(self.config) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def require_config(self) -> Path:
        """The configuration file of a run that exists.

        Raises:
            FileNotFoundError: There is none.
        """
        if not self.config.is_file():
            raise FileNotFoundError(f"{self.root} is no run: it has no config.yaml. `make train` makes one.")
        return self.config

    def next_log(self) -> str:
        """Name of a new folder for this start's CSV log; earlier starts keep theirs."""
        return f"{len(list((self.root / 'logs').glob('*'))):03d}"

    def merge_logs(self) -> Path:
        """Join the CSV logs of all starts into ``metrics.csv``; steps that were trained again count once."""
        rows: list[dict[str, str]] = []
        for log in sorted((self.root / "logs").glob("*/metrics.csv")):
            with log.open(encoding="utf-8", newline="") as file:
                new = list(csv.DictReader(file))
            if new:
                start = min(int(row["step"]) for row in new)
                rows = [row for row in rows if int(row["step"]) < start] + new
        columns = list(dict.fromkeys(key for row in rows for key in row))
        target = self.root / "metrics.csv"
        with replacing(target) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        return target


def identity(text: str) -> str:
    """A hash of a configuration (YAML) by what makes its run: what may differ between two starts is left out."""
    return hashlib.sha256(json.dumps(_fixed(text), sort_keys=True).encode()).hexdigest()


def _fixed(text: str) -> dict[str, Any]:
    config = {key: value for key, value in yaml.safe_load(text).items() if key not in _FREE_KEYS}
    config["trainer"] = {k: v for k, v in config.get("trainer", {}).items() if k not in _FREE_TRAINER_KEYS}
    return config


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
    elif old != new:
        yield f"{path} is {old} there, {new} here"
