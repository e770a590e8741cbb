"""What `<run>/results.json` holds: its schema, and the check of it.

Accuracies and ratios are fractions (0.71, not 71 %), negative log-likelihoods (nll) are in nats, weights in bytes,
times in seconds. A section is missing until the stage that writes it has run.
"""

from typing import Any, Literal, NotRequired, cast

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from qtale_lightning.results.fields import Bits, Count, Fraction, Number, Quantity, Thresholds
from qtale_lightning.results.fingerprints import Fingerprint
from qtale_lightning.results.routing import Changes, Routing
from qtale_lightning.results.scores import TaskScores
from qtale_lightning.results.selection import Search, Selected

SCHEMA: Literal[1] = 1
FILE_NAME = "results.json"


class Git(TypedDict):
    """The commit that ran; `dirty`: tracked files differed from it."""

    commit: str
    dirty: bool


class MadeFrom(TypedDict):
    """Digests of what a run began with: the `base` model's folder (a hub's id as it is, None where the model has its
    own source), the `files` of rows, and the `rows` as they were encoded, by split and task; and of the `teacher`'s
    folder, where there is one."""

    base: str | None
    teacher: NotRequired[str | None]
    files: str | None
    rows: dict[str, dict[str, str]]


class Run(TypedDict):
    """What ran, from what, and on what: `source` is where the base model was taken from, `precision` training's, as
    Lightning names it; `git` is None outside a repository. `made_from` is missing from older runs."""

    model: str
    source: NotRequired[str]
    method: str
    data: str
    seed: int
    precision: NotRequired[str]
    made_from: NotRequired[MadeFrom]
    git: Git | None
    versions: dict[str, str]
    hardware: str
    command: str


class Train(TypedDict):
    """Training facts: unpadded input `tokens`, and in `final_losses` the last logged value of each term, and of λ1."""

    steps: Count
    examples: Count
    tokens: Count
    seconds: Quantity
    tokens_per_second: Quantity
    trainable_parameters: Count
    final_losses: dict[str, Number]


class Evaluation(TypedDict):
    """One evaluation of one model at one θ. `average` is the mean over tasks, where all of them report an accuracy;
    None where they measure different things, and `no_average` says so.

    `execution_ratio` is executed layers over all layers, `flops_ratio` counted FLOPs over the base model's
    (routers included, so it can pass 1), `seconds` the measured time of this evaluation, and `engine` the
    quantizer ("none" at 16 bits; "+a8+h4" behind it: tokens in 8 bits, the head in 4; "+0:4,32:3": answers written at 4
    bits, which `bits` says, until they have 32 tokens, then at 3).
    `execution_ratio_per_layer` has shape `(layers,)`; where attention and MLP are decided about apart, these are shares
    of a layer's weights, and `execution_ratio_per_sublayer` has both, `(2 · layers,)`. Evaluations made together share
    the time of what can't differ between them; written answers, of `writing_tokens`, take `writing_seconds` more.
    `dtype` is what the model computed in. What was answered to each question lies in `predictions/`, and what was
    written in `generations/`. `fingerprint` says which model answered which questions; older rows have none, and are
    measured again where they are asked for.
    """

    bits: Bits
    engine: str
    theta: Thresholds
    split: Literal["calibration", "validation"]
    examples: Count
    execution_ratio: Fraction
    flops_ratio: Quantity
    accuracy: dict[str, TaskScores]
    average: Fraction | None
    average_stderr: Quantity | None
    no_average: NotRequired[str]
    average_nll: Number
    average_nll_stderr: Quantity
    execution_ratio_per_layer: list[Fraction]
    execution_ratio_per_sublayer: NotRequired[list[Fraction]]
    weight_bytes: Count
    seconds: Quantity
    dtype: NotRequired[str]
    writing_seconds: NotRequired[Quantity]
    writing_tokens: NotRequired[Count]
    protocol: dict[str, Any]
    fingerprint: NotRequired[Fingerprint]


def units_executed(row: Evaluation) -> list[float]:
    """Share of tokens that execute each unit of a model, what is decided about: each layer, or each sublayer."""
    return row.get("execution_ratio_per_sublayer", row["execution_ratio_per_layer"])


class Results(TypedDict):
    """The whole file."""

    schema: Literal[1]
    run: NotRequired[Run]
    train: NotRequired[Train]
    routing: NotRequired[Routing]
    evaluation: list[Evaluation]
    selected: list[Selected]
    searches: NotRequired[list[Search]]
    changes: NotRequired[list[Changes]]


WRITTEN_BY = {
    "run": "fit",
    "train": "fit",
    "routing": "fit",
    "evaluation": "evaluate",
    "selected": "thresholds",
    "searches": "thresholds",
    "changes": "inspect",
}
"""The sections, and the stage that writes each."""

_SCHEMA = TypeAdapter(Results)


def validate(results: object, source: str = FILE_NAME) -> Results:
    """Checks keys, types and ranges, and returns `results` unchanged, typed.

    Raises:
        ValueError: names `source`, each offending key (the first five) and the stage that writes it.
    """
    try:
        _SCHEMA.validate_python(results, strict=True)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        lines = [f"  {_where(p['loc'])}: {_explain(p)}" for p in problems[:5]]
        if len(problems) > 5:
            lines.append(f"  … and {len(problems) - 5} more")
        sections = {str(p["loc"][0]) for p in problems if p["loc"]}
        stages = sorted({WRITTEN_BY[section] for section in sections if section in WRITTEN_BY})
        remedy = f"\nWritten by: python -m qtale_lightning {', '.join(stages)}" if stages else ""
        raise ValueError(f"{source} isn't a valid results file:\n" + "\n".join(lines) + remedy) from None
    return cast(Results, results)


def _where(keys: tuple[int | str, ...]) -> str:
    """Keys joined with dots, without the metric that pydantic puts in front of a task's own keys."""
    in_task = keys[:1] == ("evaluation",) and keys[2:3] == ("accuracy",)
    return ".".join(map(str, (*keys[:4], *keys[5:]) if in_task else keys)) or "top level"


def _explain(problem: Any) -> str:
    if problem["type"] == "missing":
        return "is missing"
    return f"{problem['msg']}, not {problem['input']!r:.60}"
