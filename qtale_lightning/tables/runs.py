"""The runs that a table's lines need: their resolved configuration, and the folder where each is or will be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from qtale_lightning import digests
from qtale_lightning.cli import QTALECLI
from qtale_lightning.data.asking import Asking
from qtale_lightning.evaluation.options import SweepOptions
from qtale_lightning.experiments import find
from qtale_lightning.manifest import digest
from qtale_lightning.plan import optimizer_steps, training_flops
from qtale_lightning.precision import PRECISIONS
from qtale_lightning.quantization.options import QuantizationOptions
from qtale_lightning.results.origin import origin
from qtale_lightning.results.schema import FILE_NAME, Results
from qtale_lightning.results.store import load_or_new
from qtale_lightning.run import RunDirectory, identity
from qtale_lightning.tables.declaration import Line, Option
from qtale_lightning.tables.request import Request
from qtale_lightning.yaml_files import plain_yaml


@dataclass(frozen=True)
class TableRun:
    """One run of a table.

    Attributes:
        arguments: Of `fit`.
        identity: Of its resolved configuration, base model and rows; a run that has it, wherever below `out`, is this.
        places: By option, where its rows and its base model lie now.
        steps: Optimizer steps of its training.
        flops: Of its training, about.
        asking: How its questions are answered.
        begun: The run that it begins with; None: it begins with the base model.
    """

    directory: RunDirectory
    data: str
    seed: int
    arguments: tuple[str, ...]
    identity: str
    quantization: QuantizationOptions
    sweep: SweepOptions
    places: Mapping[str, str]
    steps: int
    flops: float
    asking: Asking
    begun: "TableRun | None" = None

    @cached_property
    def recorded(self) -> str:
        """Its identity by what its folder says, once it is finished: before, one that waits for another has none."""
        return recorded_identity(self.directory.root)

    @property
    def finished(self) -> bool:
        """Whether its `fit` came to its end; what is missing then, the stage commands make."""
        root = self.directory.root
        there = self.directory.model().is_dir() and (root / "results.md").is_file()
        return there and "train" in self.results

    def moved(self) -> list[str]:
        """Options for a stage, that say where rows and base model lie now if its configuration has another place."""
        config = self.directory.read_config() if self.directory.config.is_file() else {}
        found = []
        for option, place in self.places.items():
            section, key = option.split(".")
            there = config.get(section, {}).get(key)
            if there is not None and str(Path(there).resolve()) != place:
                found += [f"--{option}", place]
        return found

    @property
    def results(self) -> Results:
        """What `results.json` says now; empty where it isn't there yet."""
        file = self.directory.root / FILE_NAME
        if not file.is_file():
            return load_or_new(self.directory.root)
        return _read_once(self.directory.root, digest(file))


@lru_cache(maxsize=256)
def _read_once(root: Path, content: str) -> Results:
    """A table asks for the same file many times."""
    return load_or_new(root)


def known_runs(out: Path) -> dict[str, Path]:
    """Folders of the runs below `out`, by the identity of their configuration and of what they were made from.

    Raises:
        DamagedFileError: A run's configuration or results aren't what it wrote.
    """
    found: dict[str, Path] = {}
    for file in sorted([*out.glob("*/config.yaml"), *out.glob("*/*/config.yaml")]):
        found.setdefault(recorded_identity(file.parent), file.parent)
    return found


def recorded_identity(root: Path) -> str:
    """A run's, by what its folder says.

    Raises:
        DamagedFileError: as `known_runs`.
    """
    config = RunDirectory(root).read_config()
    run = load_or_new(root).get("run")
    # Older runs don't say what they were made from: it is taken for what lies there now.
    return identity(config, (run.get("made_from") if run else None) or origin(config))


def resolve(
    request: Request,
    base: Sequence[Path],
    line: Line,
    data: str,
    seed: int,
    known: dict[str, Path],
    begun: TableRun | None = None,
) -> TableRun:
    """A line's run for one seed: its configuration resolved, checked and found among those that are there.

    It is the table's base, then the method's file, then options.

    A new run goes to `<out>/<model>-<method>-<data>-s<seed>`; with options of its line, or where that folder holds
    another configuration, to a folder of their own below `out`.

    Args:
        base: The table's.
        known: Of `known_runs`; what is new is added.
        begun: The run that it begins with, where the line says so. While that isn't finished, what would be read of it
            isn't checked, nor can its content make this run known again.

    Raises:
        ValueError: The configuration can't work.
    """
    files = (*base, Path(f"experiments/methods/{line.method}.yaml"))
    arguments = [part for file in files for part in ("--config", str(find(file)))]
    arguments += request.options
    for key, value in line.options:
        arguments += [f"--{key}", _argument(value)]
    arguments += ["--data.tasks", data, "--seed_everything", str(seed)]
    waits, start = begun is not None and not begun.finished, list[str]()
    if begun is not None:
        start += ["--model.path", str(begun.directory.model()), "--model.revision", "null"]
        if dict(line.options).get("model.distillation"):
            start += ["--model.teacher", str(begun.directory.root)]
    cli = _parsed([*arguments, *(["--model.distillation", "0"] if waits else start)], request.out)
    arguments += start
    if begun is None and cli.model.path is not None and cli.model.revision is not None:
        arguments += ["--model.revision", cli.model.revision]  # a branch may move before the run starts
    keys = _identities(cli)
    if begun is not None and waits:
        keys = [digests.of([key, begun.identity, line.options]) for key in keys]
    key = next((key for key in keys if key in known), keys[0])
    if key in known:
        root = known[key]
    else:
        root = _folder(request.out, _variant(line), cli.run.root.name, key)
        known[key] = root
    return TableRun(
        directory=RunDirectory(root),
        data=cli.datamodule.label,
        seed=seed,
        arguments=(*arguments, "--out", str(root.parent)),
        identity=key,
        quantization=cli.quantization,
        sweep=cli.sweep,
        places={
            option: str(Path(place).resolve())
            for option, place in {"data.root": cli.datamodule.root, "model.path": cli.model.path}.items()
            if place is not None and Path(place).is_dir()
        },
        steps=optimizer_steps(cli),
        flops=training_flops(cli),
        asking=cli.datamodule.asking,
        begun=begun,
    )


def _parsed(arguments: Sequence[str], out: Path) -> QTALECLI:
    """What `fit` would make of its arguments, checked."""
    cli = QTALECLI([*arguments, "--out", str(out)], "python -m qtale_lightning fit")
    cli.check()
    cli.check_training()
    cli.pin_base()
    return cli


def _identities(cli: QTALECLI) -> list[str]:
    """Of the run as it would start here; and as it may have on another device, which precision was left to."""
    config = plain_yaml(cli.config_text())
    made_from, trainer = origin(config), config["trainer"]
    precisions = [trainer["precision"], *(() if cli.precision_origin == "given" else PRECISIONS)]
    return [
        identity({**config, "trainer": {**trainer, "precision": precision}}, made_from)
        for precision in precisions
    ]


def _folder(out: Path, variant: str, name: str, key: str) -> Path:
    """Where a new run goes: a readable folder, unless another configuration has it."""
    root = out / variant / name
    if not (root / "config.yaml").is_file():
        return root
    return out / "-".join(part for part in (variant, key[:8]) if part) / name


def _variant(line: Line) -> str:
    """Name of the folder of runs that differ in a line's options, and in what they begin with; empty without any."""
    options = [*line.options, *([("after", line.after.replace("/", "-"))] if line.after else [])]
    return "-".join(f"{key.removeprefix('model.')}={_argument(value)}" for key, value in options)


def _argument(value: Option) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
