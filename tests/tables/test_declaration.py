"""Declarations are read, expanded into lines, and refused where they are wrong, with the file and the key."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qtale_lightning.experiments import names
from qtale_lightning.routing.perturbation import UNPERTURBED
from qtale_lightning.tables.declaration import FOLDER, load_declaration
from qtale_lightning.tables.theta import BudgetRule

Declared = Callable[[str], Path]
HEAD = "title: t\ncells:\n"


def test_lists_are_lines_of_every_combination(declared: Declared) -> None:
    text = HEAD + (
        "  - {name: a, method: qtale, options: {model.lambda_entropy: [0.2, 1.0], model.lr: 0.1}, bits: [16, 3],\n"
        "     engine: [rtn, native], theta: [0.5, 0.1]}\n"
    )
    lines = load_declaration(declared(text)).lines
    # 2 values of λ₂ × 2 θ, at 16 bits once and at 3 bits by each engine.
    assert len(lines) == 2 * 2 * (1 + 2)
    assert {(line.bits, line.engine) for line in lines} == {(16, "none"), (3, "rtn"), (3, "native")}
    assert {line.setting for line in lines} == {"λ₂ = 0.2", "λ₂ = 1.0"}, "what isn't varied isn't shown"


def test_lists_of_perturbations_are_lines(declared: Declared) -> None:
    text = HEAD + (
        "  - {name: a, method: qtale, bits: [16], theta: 0.5,\n"
        "     perturb: {random_gates: [0, 0.1], random_ratio: 0.7, draw: [0, 1]}}\n"
    )
    lines = load_declaration(declared(text.replace("draw: [0, 1]", "noise: [0, 0.5]"))).lines
    assert [line.setting for line in lines] == [
        "", "noise 0.5", "10 % random gates", "noise 0.5, 10 % random gates",
    ]  # fmt: skip
    assert lines[0].perturbation == UNPERTURBED, "a ratio of gates that aren't there is none"
    lines = load_declaration(declared(text.replace("[0, 0.1]", "0.1"))).lines
    assert [line.setting for line in lines] == ["10 % random gates", "10 % random gates, draw 1"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (HEAD + "  - {name: a, method: qtal, theta: 0.5}\n", "cells.0.method: unknown method 'qtal'"),
        (HEAD + "  - {name: a, method: qtale}\n", "cells.0: the method qtale needs 'theta'"),
        (HEAD + "  - {name: a, method: full, theta: 0.5}\n", "cells.0: the method full has no θ"),
        (HEAD + "  - {name: a, method: qtale, theta: 1.5}\n", "cells.0.theta: Input should be less than"),
        (HEAD + "  - {name: a, method: qtale, theta: {rule: best}}\n", "cells.0.theta.rule: Input should be"),
        (HEAD + "  - {name: a, method: qtale, theta: {rule: budget}}\n", "cells.0.theta: give either 'budget'"),
        (HEAD + "  - {name: a, method: full, bit: [3]}\n", "cells.0.bit: Extra inputs"),
        (HEAD + "  - {name: a, method: full, bits: [0]}\n", "cells.0.bits.0: Input should be"),
        (HEAD + "  - {name: a, method: full, engine: [awk]}\n", "cells.0.engine.0: 'awk': choose one of native,"),
        (HEAD + "  - {name: a, method: full, options: {quantize.bits: 3}}\n", "options.quantize.bits: only"),
        (HEAD + "  - {name: a, method: full}\n  - {name: a, method: full}\n", "2 lines are the same: 'a'"),
        (
            HEAD + "  - {name: a, method: qtale, theta: {rule: budget, like: b}}\n",
            "like 'b' must name one line that skips layers at 16 bits",
        ),
        (HEAD + "  - {name: a, method: qtale, theta: 0.5, after: b}\n", "after 'b' must name a line of the method"),
        (
            HEAD + "  - {name: b, method: full, options: {model.lr: [0.1, 0.2]}}\n"
            "  - {name: a, method: qtale, theta: 0.5, after: b}\n",
            "after 'b' must name a line of one run a seed",
        ),
        (
            HEAD + "  - {name: b, method: full, data: [alpaca]}\n"
            "  - {name: a, method: qtale, theta: 0.5, after: b}\n",
            "after 'b' must name a line of the method full on the same data",
        ),
        (HEAD + "  - {name: a, method: full, perturb: {noise: 1}}\n", "perturb: the method full has no θ"),
        (HEAD + "  - {name: a, method: qtale, theta: 0.5, perturb: {nois: 1}}\n", "perturb.nois: there is no such"),
        (HEAD + "  - {name: a, method: qtale, theta: 0.5, perturb: {noise: -1}}\n", "--noise -1.0: must be >= 0"),
        (HEAD + "  - {name: a, method: qtale, theta: 0.5, perturb: {random_gates: 0.1}}\n", "needs --random_ratio"),
        ("title: t\ncells: []\n", "cells: List should have at least 1"),
        ("title: t\ncolumns: [speed]\ncells: [{name: a, method: full}]\n", "columns.0: Input should be"),
        (
            HEAD + "  - {name: a, method: full}\npaper:\n"
            "  - {model: llama2-7b, cell: b, bits: 3, column: average, value: 1}\n",
            "paper: there is no line 'b' at 3 bits",
        ),
        ("title: t\n cells: [\n", "mine.yaml:2: not YAML"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_file_and_key(declared: Declared, text: str, says: str) -> None:
    file = declared(text)
    with pytest.raises(ValueError, match=r"mine\.yaml") as refused:
        load_declaration(file)
    assert says in str(refused.value)


def test_an_unknown_table_is_refused_with_those_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(
        FileNotFoundError, match=r"experiments/tables/no\.yaml isn't there: choose one of ablation"
    ):
        load_declaration(FOLDER / "no.yaml")


def test_the_declared_tables_are_the_issues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert names("tables") == [
        "ablation", "baselines", "cost", "csqa", "diversity", "fairness", "generality", "low-bit",
        "phases", "qtale-plus", "quantizers", "recipe", "sensitivity", "toolbox",
    ]  # fmt: skip
    fairness = load_declaration(FOLDER / "fairness.yaml")
    like = [line for line in fairness.lines if isinstance(line.theta, BudgetRule) and line.theta.like]
    assert {line.method for line in like} == {"dllm"}
    assert all(fairness.like(line).name == "QTALE" for line in like)  # type: ignore[union-attr]
    assert 0.005 in {line.theta for line in fairness.lines}


def test_kinds_of_runs_come_in_the_order_of_their_needs(declared: Declared) -> None:
    """z takes the budget of a line of qtale, another line of which takes that of dllm."""
    text = HEAD + (
        "  - {name: z, method: qtale-plus, theta: {rule: budget, like: a}, after: f}\n"
        "  - {name: a, method: qtale, theta: 0.5}\n  - {name: b, method: qtale, theta: {rule: budget, like: w}}\n"
        "  - {name: w, method: dllm, theta: 0.5}\n  - {name: f, method: full}\n"
    )
    found = load_declaration(declared(text))
    levels = {line.method: found.levels[line.kind] for line in found.lines}
    assert levels == {"dllm": 0, "full": 0, "qtale": 1, "qtale-plus": 2}
