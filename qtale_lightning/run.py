"""A run's directory: where its parts lie, and to which configuration it belongs."""

import csv
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qtale_lightning.checks import OWNED
from qtale_lightning.files import remove_leftovers
from qtale_lightning.locks import locked
from qtale_lightning.manifest import DamagedFileError, read_object, record, verify, writing
from qtale_lightning.quantization.engines import DEFAULT, find, folder
from qtale_lightning.yaml_files import RefusedYamlError, plain_yaml, read_yaml

# Settings that may differ between two starts of the same run: where it runs, and what happens after training,
# where every piece is checked on its own.
_FREE_KEYS = {"config", "ckpt_path", "out", "wandb", "wandb_project", "validations", "sweep", "quantize"}
FREE_TRAINER_KEYS = {
    "accelerator",
    "devices",
    "num_nodes",
    "strategy",
    "enable_progress_bar",
    "log_every_n_steps",
    *OWNED,
}


# Where the base model, a teacher and the rows lie is free, too, where it is known by content what they were.
_PLACES = (("model", "path"), ("model", "teacher"), ("data", "root"))
# Options that older runs don't say: what these values mean is what they did.
_ADDED: tuple[tuple[str, str, Any], ...] = (
    ("model", "lambda_prediction", 0.0),
    ("model", "ratio_budget", "token"),
    ("model", "ratio_ascent", 0.0),
    ("model", "router_bias", [0.1, 2.0]),
    ("model", "distillation", 0.0),
    ("model", "teacher", None),
    ("model", "stages", "joint"),
    ("model", "noise_bits", None),
    ("model", "noise_schedule", 0.0),
    ("model", "gates", "layer"),
    ("model", "keep_kv", False),
    ("model", "stand_in_rank", 0),
)
_SECTIONS = ("trainer", "model", "data", "quantize", "sweep")
_SPLITS = {"train": "training", "calibration": "calibration", "validation": "validation"}

CONFIG_REMEDY = (
    "remove it and start the run's command again, which results.json has under run.command; it writes it anew"
)
LOG_REMEDY = "remove it, and the curves of the run lack its steps"


# Of a folder that holds several precisions: bits that complete one, or one's own scales and zero points.
_NESTED = re.compile(r"\.(plane|scales|zeros)(\d)$")


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

    def model(self, bits: float = 16, engine: str = DEFAULT) -> Path:
        """The exported model at a precision, quantized by an engine below 16 bits."""
        return self.root / ("model" if bits == 16 else f"model-{self._precision(bits, engine, '-')}")

    def remedy(self, model: Path) -> str:
        """What to do about a damaged folder of :meth:`model`."""
        if model == self.model():
            return f"remove {model} and start the run's command again: it exports the best checkpoint anew"
        return f"remove {model}: `python -m qtale_lightning quantize {self.root}` makes it anew"

    def search(self, bits: float, engine: str = DEFAULT) -> Path:
        """What an engine's search found."""
        return self.root / f"{self._precision(bits, engine, '-search-')}.safetensors"

    @staticmethod
    def _precision(bits: float, engine: str, between: str) -> str:
        """What files of an engine are called: without a precision where they hold all that it has."""
        declared = find(engine)
        if declared.holds:
            return f"{folder(declared)}{between.removesuffix('-')}"
        return f"{folder(declared)}{between}{bits:g}bit"

    def quantization_config(self, bits: float = 16, engine: str = DEFAULT) -> dict[str, Any] | None:
        """What the folder of :meth:`model` says of its quantization; None at 16 bits.

        Raises:
            DamagedFileError: Its configuration isn't what the run wrote, or says nothing of it.
        """
        if bits == 16:
            return None
        folder = self.model(bits, engine)
        keys = ["quantization_config"]
        config = read_object(self.root, folder / "config.json", self.remedy(folder), keys)
        return dict(config["quantization_config"])

    def weight_bytes(self, bits: float = 16, engine: str = DEFAULT) -> int:
        """Bytes of the tensors of a precision that :meth:`model` holds on disk."""
        total = 0
        for file in self.model(bits, engine).glob("*.safetensors"):
            with file.open("rb") as opened:
                tensors = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
            for name, tensor in tensors.items():
                part = _NESTED.search(name)
                width = bits if part is None else int(part[2])
                others = width > bits if part is not None and part[1] == "plane" else width != bits
                if name != "__metadata__" and not others:
                    first, last = tensor["data_offsets"]
                    total += last - first
        return total

    def claim(
        self, text: str, made_from: Mapping[str, Any] | None = None, known: Mapping[str, Any] | None = None
    ) -> None:
        """Take the directory for a configuration (YAML), or accept that it's already this configuration's.

        Raises:
            DamagedFileError, ValueError: as `check_claim`.
        """
        self.check_claim(text, made_from, known)
        self.root.mkdir(parents=True, exist_ok=True)
        with writing(self.root, self.config) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def check_claim(
        self, text: str, made_from: Mapping[str, Any] | None = None, known: Mapping[str, Any] | None = None
    ) -> None:
        """Refuse a configuration (YAML) that isn't the one whose directory this is; any, where it's nobody's yet.

        Args:
            made_from: Digests of the base model and the rows that the configuration names now.
            known: The same of those that the run began with. Where they are known, it doesn't matter where base and
                rows lie; else they must lie where they did.

        Raises:
            ValueError: Another configuration, base or other rows use it; the message names what differs.
            DamagedFileError: The run's own configuration is damaged.
        """
        if self.config.is_file():
            ours, theirs = (
                _fixed(config, known is None) for config in (plain_yaml(text), self.read_config())
            )
            differing = list(_differences(theirs, ours))
            if differing:
                shown = "; ".join(differing[:5]) + ("; …" if len(differing) > 5 else "")
                raise ValueError(
                    f"{self.root} holds a run of another configuration ({shown}). Give another folder (OUT=… of make, "
                    "--out), or move that run away."
                )
        if made_from and known and (other := list(_other_parts(known, made_from))):
            raise ValueError(
                f"{self.root} holds a run that began with {' and '.join(other)}. Give what it began with, at any "
                "place, or another folder for a new run (OUT=… of make, --out)."
            )

    def require_config(self) -> Path:
        """The configuration file of a run that exists, whole.

        Raises:
            FileNotFoundError: There is none.
            DamagedFileError: It isn't what the run wrote, or no configuration.
        """
        if not self.config.is_file():
            raise FileNotFoundError(f"{self.root} is no run: it has no config.yaml. `make train` makes one.")
        self.read_config()
        return self.config

    def read_config(self) -> dict[str, Any]:
        """The resolved configuration.

        Raises:
            FileNotFoundError: There is none.
            DamagedFileError: It isn't what the run wrote, or no configuration.
        """
        verify(self.root, self.config, CONFIG_REMEDY)
        try:
            config = read_yaml(self.config)
        except RefusedYamlError as error:
            raise DamagedFileError(f"{error}: {CONFIG_REMEDY}") from error
        sections = config if isinstance(config, dict) else {}
        if missing := [key for key in _SECTIONS if not isinstance(sections.get(key), dict)]:
            raise DamagedFileError(
                f"{self.config} has no {', '.join(missing)}, so it isn't whole: {CONFIG_REMEDY}"
            )
        return sections

    def next_log(self) -> str:
        """Name of a new folder for this start's CSV log; earlier starts keep theirs."""
        return f"{len(list((self.root / 'logs').glob('*'))):03d}"

    def list_logs(self) -> None:
        """Put the CSV logs of starts that have ended on the run's list: nothing is written to them any more."""
        record(self.root, self.logs())

    def logs(self) -> list[Path]:
        """The CSV logs of all starts, in order."""
        return sorted((self.root / "logs").glob("*/metrics.csv"))

    def merge_logs(self) -> Path:
        """Join the CSV logs of all starts into ``metrics.csv``; steps that were trained again count once.

        Raises:
            DamagedFileError: A log isn't what its start wrote, or no log.
        """
        rows: list[dict[str, str]] = []
        for log in self.logs():
            new = _logged(verify(self.root, log, LOG_REMEDY))
            if new:
                start = min(int(row["step"]) for row in new)
                rows = [row for row in rows if int(row["step"]) < start] + new
        columns = list(dict.fromkeys(key for row in rows for key in row))
        target = self.root / "metrics.csv"
        with (
            writing(self.root, target) as temporary,
            temporary.open("w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        return target


def identity(config: Mapping[str, Any], made_from: Mapping[str, Any]) -> str:
    """A hash of what makes a run: its configuration without what may differ between two starts, and, wherever they lie,
    the base model and the files of rows that it is ``made_from`` (see `qtale_lightning.results.origin`)."""
    parts = {key: made_from.get(key) for key in ("base", "files")}
    if "teacher" in made_from:
        parts["teacher"] = made_from["teacher"]
    return hashlib.sha256(json.dumps([_fixed(config), parts], sort_keys=True).encode()).hexdigest()


def _fixed(config: Mapping[str, Any], places: bool = False) -> dict[str, Any]:
    """What may not differ between two starts; with the places of base and rows, if these are all that is known."""
    fixed = {key: value for key, value in config.items() if key not in _FREE_KEYS}
    fixed["trainer"] = {k: v for k, v in config.get("trainer", {}).items() if k not in FREE_TRAINER_KEYS}
    for section, key, value in _ADDED:
        fixed[section] = {k: v for k, v in fixed.get(section, {}).items() if (k, v) != (key, value)}
    if not places:
        for section, key in _PLACES:
            fixed[section] = {k: v for k, v in fixed.get(section, {}).items() if k != key}
    return fixed


def _other_parts(known: Mapping[str, Any], made_from: Mapping[str, Any]) -> Iterator[str]:
    """In words, what of a run's base model and rows is another now."""
    if known.get("base") != made_from.get("base"):
        yield "another base model (--model.path)"
    if known.get("teacher") != made_from.get("teacher"):
        yield "another teacher (--model.teacher)"
    for split, name in _SPLITS.items():
        before, now = ({**one.get("rows", {}).get(split, {})} for one in (known, made_from))
        if before and (tasks := [task for task in now if now[task] != before.get(task)]):
            yield f"other {name} rows of {', '.join(tasks)} (--data.root)"


def _logged(log: Path) -> list[dict[str, str]]:
    """The rows of a CSV log, without a last one that a killed process didn't finish."""
    try:
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        rows = list(csv.DictReader(lines[:-1] if lines and not lines[-1].endswith("\n") else lines))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DamagedFileError(f"{log} is damaged ({error}): {LOG_REMEDY}") from error
    for number, row in enumerate(rows, start=2):
        whole = None not in row and None not in row.values()
        if not whole or not row.get("step", "").isdecimal():
            raise DamagedFileError(f"{log}:{number} is no row of its columns with a step: {LOG_REMEDY}")
    return rows


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
    elif old != new:
        yield f"{path} is {old} there, {new} here"
