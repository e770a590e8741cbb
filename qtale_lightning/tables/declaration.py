"""A table's declaration, `experiments/tables/<name>.yaml`: its cells and columns, read and checked.

A cell names a method and what is evaluated of it. Lists in it (bits, engines, thresholds, values of options) stand for
every combination: each is a `Line` of the table, and needs one run a seed.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from qtale_lightning.bits_schedule import Schedule
from qtale_lightning.experiments import find, names
from qtale_lightning.quantization import engines
from qtale_lightning.results.fields import Bits
from qtale_lightning.routing import method_of
from qtale_lightning.routing.perturbation import Perturbation
from qtale_lightning.tables.theta import BudgetRule, Declared, LineTheta, Theta
from qtale_lightning.yaml_files import read_yaml

FOLDER = Path("experiments/tables")
SYMBOLS = {
    "model.lambda_entropy": "λ₂",
    "model.lambda_ratio": "λ₁",
    "model.target_ratio": "R_target",
    "model.temperature": "τ",
}
"""What tables and figures call an option."""

Option = bool | int | float | str
Column = Literal[
    "theta", "execution_ratio", "flops_ratio", "weight_mb", "kv_kib", "seconds", "tasks", "average", "nll",
    "added_nll", "path_distance", "tokens_per_second",
]  # fmt: skip
EngineName = Annotated[str, AfterValidator(lambda name: engines.find(name).name)]


class Cell(Declared):
    """What is evaluated of one method: the options that its runs differ in, and at which bits, engines and θ.

    Its decisions may be perturbed, by options of a :class:`~qtale_lightning.routing.perturbation.Perturbation`. Its
    runs may begin with what those of another line, of the method full, have learned: `after` names it; and they are
    taught by those, where their options ask for distillation. Lines of one `group` can be compared with each other (see
    `Declaration.compare`).
    """

    name: str
    method: Annotated[str, AfterValidator(lambda name: method_of(name).name)]
    options: dict[str, Option | list[Option]] = Field(default_factory=dict)
    bits: list[Bits] = Field([16, 4, 3], min_length=1)
    engine: list[EngineName] = Field([engines.DEFAULT], min_length=1)
    theta: Theta | None = None
    perturb: dict[str, float | list[float]] = Field(default_factory=dict)
    bits_schedule: Annotated[str, AfterValidator(lambda text: str(Schedule.read(text)))] = ""
    data: list[str] = Field(default_factory=list)
    group: str = ""
    after: str = ""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.theta is not None) != method_of(self.method).theta:
            why = "needs 'theta'" if self.theta is None else "has no θ: leave 'theta' out"
            raise ValueError(f"the method {self.method} {why}")
        if self.bits_schedule:
            first = Schedule.read(self.bits_schedule)[0].bits
            fixed = self.theta is None or isinstance(self.theta, int | float)
            if self.bits != [first] or not fixed:
                raise ValueError(
                    f"bits_schedule {self.bits_schedule}: its line is of the first precision, bits: [{first}], at one θ"
                )
        for key, value in self.options.items():
            if key.split(".")[0] not in ("model", "data", "trainer"):
                raise ValueError(
                    f"options.{key}: only --model, --data and --trainer options make another run; bits, engine and "
                    "theta are keys of the cell"
                )
            if value == []:
                raise ValueError(f"options.{key}: the list is empty")
        if self.perturb and self.theta is None:
            raise ValueError(f"perturb: the method {self.method} has no θ, and no decisions of routers")
        self.perturbations()
        return self

    def perturbations(self) -> list[Perturbation]:
        """Every combination of what is declared (ValueError: there is no such perturbation)."""
        if unknown := self.perturb.keys() - {option.name for option in fields(Perturbation)}:
            raise ValueError(f"perturb.{min(unknown)}: there is no such option of a perturbation")
        chosen = product(*(value if isinstance(value, list) else [value] for value in self.perturb.values()))
        return [_perturbation(dict(zip(self.perturb, values, strict=True))) for values in chosen]


class PaperValue(Declared):
    """A value that the paper gives in the setting of experiments/paper/<model>.yaml: in percent for accuracies."""

    model: str
    cell: str
    bits: Bits
    column: Literal["average", "flops_ratio"]
    value: float


@dataclass(frozen=True)
class Line:
    """A line of a table; at 16 bits the engine is "none".

    Attributes:
        options: What its runs are started with besides method, data and seed.
        varied: Those of the options of which the declaration has several values.
        data: Empty: what the command line says.
        after: The line whose runs its own begin with; empty: with the base model.
    """

    name: str
    method: str
    options: tuple[tuple[str, Option], ...]
    varied: tuple[str, ...]
    bits: float
    engine: str
    theta: LineTheta
    perturbation: Perturbation
    data: tuple[str, ...]
    group: str
    bits_schedule: str = ""
    after: str = ""

    @property
    def kind(self) -> tuple[object, ...]:
        """What its runs have in common, but for data and seed."""
        return self.method, self.options, self.after

    @property
    def setting(self) -> str:
        """The varied options, such as "λ₂ = 0.5", and how decisions are perturbed."""
        varied = setting_of([(key, value) for key, value in self.options if key in self.varied])
        return ", ".join(filter(None, [varied, self.perturbation.words]))

    @property
    def key(self) -> tuple[object, ...]:
        """What no two lines may have in common."""
        return (
            self.name,
            self.options,
            self.after,
            self.bits,
            self.engine,
            self.theta if isinstance(self.theta, float) else None,
            self.perturbation,
            self.bits_schedule,
        )


class Declaration(Declared):
    """A whole table."""

    title: str
    base: str | None = None
    """The configuration that its runs build on, a method's file coming after it; {model} stands for the model. None,
    or where a model has no such file: experiments/base.yaml and the model's."""
    cells: list[Cell] = Field(min_length=1)
    columns: list[Column] = Field(["theta", "execution_ratio", "tasks", "average", "nll"], min_length=1)
    compare: list[Literal["bits", "name", "method", "engine", "setting", "group"]] = Field(["bits"])
    """The best of the lines that agree in these is bold; by group, lines that have none aren't compared."""
    differences: bool = False
    """Whether each line's paired difference to the first of those that it is compared with is given."""
    paper: list[PaperValue] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)

    @cached_property
    def lines(self) -> list[Line]:
        """All lines, in the declaration's order."""
        return [line for cell in self.cells for line in _lines(cell)]

    def base_of(self, model: str) -> tuple[Path, ...]:
        """The files that runs of a model build on, in order.

        Raises:
            ValueError: The base is one file, which is of another model, or isn't there.
        """
        given = (Path("experiments/base.yaml"), Path(f"experiments/models/{model}.yaml"))
        if self.base is None:
            return given
        path = Path(self.base.replace("{model}", model))
        if not find(path).is_file():
            if self.base == str(path):
                raise ValueError(f"base: {path} isn't there")
            return given
        named = (read_yaml(find(path)) or {}).get("model", {}).get("name")
        if named != model:
            raise ValueError(f"base: {path} is of the model {named}: give --model {named} (MODEL=… of make)")
        return (path,)

    def like(self, line: Line) -> Line | None:
        """The line whose execution ratio is the budget of this one."""
        if not isinstance(line.theta, BudgetRule) or line.theta.like is None:
            return None
        return next((one for one in self.lines if (one.name, one.bits) == (line.theta.like, line.bits)), None)

    def source(self, line: Line) -> Line | None:
        """The line whose runs those of this one begin with."""
        return next((one for one in self.lines if one.name == line.after), None)

    @cached_property
    def levels(self) -> dict[tuple[object, ...], int]:
        """By kind of runs, how many others have to come before, each before the next: those whose budgets its lines
        take, and that it begins with. Those that need each other stand side by side.
        """
        needed: dict[tuple[object, ...], set[tuple[object, ...]]] = {line.kind: set() for line in self.lines}
        for line in self.lines:
            needed[line.kind] |= {
                other.kind for other in (self.like(line), self.source(line)) if other is not None
            }

        def level(kind: tuple[object, ...], *needing: tuple[object, ...]) -> int:
            before = needed[kind] - {kind, *needing}
            return 1 + max(level(other, kind, *needing) for other in before) if before else 0

        return {kind: level(kind) for kind in needed}

    @model_validator(mode="after")
    def _refers_to_what_is_there(self) -> Self:
        lines = self.lines
        for key, count in Counter(line.key for line in lines).items():
            if count > 1:
                raise ValueError(
                    f"{count} lines are the same: {key[0]!r} at {key[3]:g} bits; give them other names"
                )
        for line in lines:
            named = [one for one in lines if line.after and one.name == line.after]
            if line.after and (
                {one.method for one in named} != {"full"} or {one.data for one in named} != {line.data}
            ):
                raise ValueError(
                    f"cell {line.name!r}: after {line.after!r} must name a line of the method full on the same data"
                )
            if len({one.kind for one in named}) > 1 or any(one.after for one in named):
                raise ValueError(
                    f"cell {line.name!r}: after {line.after!r} must name a line of one run a seed"
                )
        for line in lines:
            if not isinstance(line.theta, BudgetRule) or line.theta.like is None:
                continue
            named = [one for one in lines if (one.name, one.bits) == (line.theta.like, line.bits)]
            if len(named) != 1 or named[0].method == "full" or named[0].data != line.data:
                raise ValueError(
                    f"cell {line.name!r}: like {line.theta.like!r} must name one line that skips layers at "
                    f"{line.bits:g} bits on the same data; {len(named)} have that name"
                )
            if isinstance(named[0].theta, BudgetRule) and named[0].theta.like:
                raise ValueError(f"cell {line.name!r}: like {line.theta.like!r} is itself like another cell")
        for value in self.paper:
            if value.model not in names("paper"):
                raise ValueError(
                    f"paper: there is no experiments/paper/{value.model}.yaml, which says the setting of its values"
                )
            if not any((line.name, line.bits) == (value.cell, value.bits) for line in lines):
                raise ValueError(f"paper: there is no line {value.cell!r} at {value.bits:g} bits")
        return self


def setting_of(options: Sequence[tuple[str, Option]]) -> str:
    """Options as tables and figures name them."""
    return ", ".join(f"{SYMBOLS.get(key, key)} = {value}" for key, value in options)


def _perturbation(values: dict[str, float]) -> Perturbation:
    """Without the ratio of random gates where there are none: lists may have 0 among them."""
    if values.get("random_gates") == 0:
        values.pop("random_ratio", None)
    if "draw" in values:
        values["draw"] = int(values["draw"])
    return Perturbation(**values)


def _lines(cell: Cell) -> list[Line]:
    values = {key: value if isinstance(value, list) else [value] for key, value in cell.options.items()}
    varied = tuple(key for key, chosen in values.items() if len(chosen) > 1)
    thetas = cell.theta if isinstance(cell.theta, list) else [cell.theta]
    lines = []
    for bits, chosen, perturbation in product(cell.bits, product(*values.values()), cell.perturbations()):
        options = tuple(zip(values, chosen, strict=True))
        for engine in ["none"] if bits == 16 else cell.engine:
            for theta in thetas:
                lines.append(
                    Line(
                        name=cell.name,
                        method=cell.method,
                        options=options,
                        varied=varied,
                        bits=bits,
                        engine=engine,
                        theta=float(theta) if isinstance(theta, int | float) else theta,
                        perturbation=perturbation,
                        data=tuple(cell.data),
                        group=cell.group,
                        bits_schedule=cell.bits_schedule,
                        after=cell.after,
                    )
                )
    return lines


def load_declaration(path: Path) -> Declaration:
    """Reads and checks a declaration.

    Raises:
        FileNotFoundError: There is none; the message names those that are there.
        ValueError: It isn't YAML (with the line), or a key is wrong (with the file and the key).
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} isn't there: choose one of {', '.join(names('tables')) or 'no table'}"
        )
    content = read_yaml(path)
    try:
        return Declaration.model_validate(content)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        tags = ("number", "list", "grid", "budget")
        found = [
            f"{'.'.join(str(part) for part in problem['loc'] if part not in tags) or 'top level'}: "
            f"{problem['msg'].removeprefix('Value error, ')}"
            for problem in problems[:5]
        ]
        raise ValueError("\n".join(f"{path}: {problem}" for problem in found)) from None
