"""Grid and random points without a server."""

from collections.abc import Callable
from typing import Any

import pytest

from qtale_lightning.sweeps.definition import SweepDefinition
from qtale_lightning.sweeps.points import points

Define = Callable[..., SweepDefinition]
DRAWN = {
    "model.lambda_entropy": {"distribution": "log_uniform_values", "min": 0.01, "max": 1.0},
    "model.target_ratio": {"min": 0.4, "max": 0.8},
    "model.lora_rank": {"min": 2, "max": 4},
    "data.mix": {"values": ["uniform", "proportional"]},
    "model.seed": {"value": 7},
}


def test_a_grid_is_every_combination_in_the_files_order(define: Define) -> None:
    sweep = define(parameters={"a": {"values": [2, 1]}, "b": {"value": "x"}, "c": {"values": [[4], [3]]}})
    assert points(sweep) == [{"a": a, "b": "x", "c": c} for a in (2, 1) for c in ([4], [3])]
    assert points(sweep, count=3) == points(sweep)[:3]


def test_draws_lie_where_they_should(define: Define) -> None:
    drawn = points(define(method="random", run_cap=400, parameters=DRAWN))
    assert len(drawn) == 400
    weights = [point["model.lambda_entropy"] for point in drawn]
    assert 0.01 <= min(weights) < 0.02
    assert 0.5 < max(weights) <= 1.0
    # Log-uniform: half of them below the geometric mean 0.1, ± 4 standard errors of 0.025; uniform were 9 %.
    assert 0.4 < sum(weight < 0.1 for weight in weights) / 400 < 0.6
    assert all(0.4 <= point["model.target_ratio"] <= 0.8 for point in drawn)
    assert {point["model.lora_rank"] for point in drawn} == {2, 3, 4}
    assert {point["data.mix"] for point in drawn} == {"uniform", "proportional"}
    assert {point["model.seed"] for point in drawn} == {7}


def test_a_seed_fixes_the_draws_and_a_longer_sweep_begins_as_a_shorter_one(define: Define) -> None:
    sweep = define(method="random", run_cap=8, parameters=DRAWN)
    assert points(sweep, seed=1) == points(sweep, seed=1)
    assert points(sweep, seed=1, count=12)[:8] == points(sweep, seed=1)
    assert points(sweep, seed=1) != points(sweep, seed=2)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"method": "bayes"}, "method bayes needs W&B's server"),
        ({"method": "random"}, "run_cap is missing"),
        ({"parameters": {"a": {"min": 0, "max": 1}}}, "parameters.a: a grid takes"),
        ({"parameters": {"a": {"values": []}}}, "parameters.a: a grid takes"),
        (
            {
                "method": "random",
                "run_cap": 1,
                "parameters": {"a": {"distribution": "normal", "min": 0, "max": 1}},
            },
            "parameters.a: distribution normal",
        ),
        (
            {"method": "random", "run_cap": 1, "parameters": {"a": {"distribution": "q_uniform", "q": 1}}},
            "parameters.a",
        ),
        ({"method": "random", "run_cap": 1, "parameters": {"a": {"min": 2, "max": 1}}}, "parameters.a"),
        (
            {
                "method": "random",
                "run_cap": 1,
                "parameters": {"a": {"distribution": "log_uniform_values", "min": 0, "max": 1}},
            },
            "parameters.a",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_isnt_done_locally_is_refused_by_its_key(
    define: Define, keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match="sweep x: ") as refusal:
        points(define(**keys))
    assert words in str(refusal.value)
