"""What can't be quantized is refused before training, with the option to change."""

import re
from dataclasses import fields
from typing import Any

import pytest

from qtale_lightning.quantization.engines import ENGINES
from qtale_lightning.quantization.options import MIN_TOKENS, QuantizationOptions
from tests.quantization.conftest import MakeRouted

SHAPES = {"model.layers.0.self_attn.q_proj": (128, 128), "model.layers.0.mlp.down_proj": (128, 384)}
RESERVED = 2


def check(reserved_tokens: int = RESERVED, **options: Any) -> None:
    QuantizationOptions(**options).check(SHAPES, reserved_tokens)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": (2, 3, 4, 5, 6, 7, 8)},
        {"bits": (2.5, 3.25, 7.9)},
        {"bits": (3.5, 4), "group_size": 32, "symmetric": True},
        {"engine": "rtn", "sequences": 1},
        {"engine": "autoawq", "patterns": {"*.down_proj": 8}},
        {"engine": "gptq", "sequential": True, "options": {"percdamp": 1, "act_order": True}},
        {"engine": "signround", "bits": (2,), "options": {"steps": 1, "batch": 1, "lr": 2, "window": 1}},
        {"bits": (), "sequences": 1},  # nothing to quantize needs no calibration
        {"sequences": -(-MIN_TOKENS // RESERVED)},
    ],
)
def test_what_can_be_done_passes(options: dict[str, Any]) -> None:
    check(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"engine": "awk"},
            "--quantize.engine 'awk': choose one of native, autoawq, gptq, nested, rtn, signround",
        ),
        (
            {"engine": "gptq", "options": {"percdamp": -1}},
            "--quantize.options: percdamp must be positive and finite, such as 0.01, not -1",
        ),
        (
            {"options": {"percdamp": 0.1}},
            "--quantize.options: the engine native has no option 'percdamp': .* none",
        ),
        (
            {"engine": "gptq", "options": {"damp": 1}},
            "--quantize.options: .*'damp': it has percdamp, act_order",
        ),
        ({"engine": "gptq", "options": {"act_order": 1}}, "--quantize.options: act_order must be a bool"),
        (
            {"engine": "rtn", "sequential": True},
            "--quantize.sequential: the engine rtn looks at no sequences",
        ),
        ({"engine": "signround", "options": {"steps": 0}}, "--quantize.options: steps must be at least 1"),
        ({"engine": "signround", "options": {"batch": 0}}, "--quantize.options: batch must be at least 1"),
        ({"engine": "signround", "options": {"lr": 0}}, "--quantize.options: lr must be positive and finite"),
        (
            {"engine": "signround", "options": {"window": 3}},
            "--quantize.options: window is 1 or 2 layers, not",
        ),
        (
            {"engine": "signround", "options": {"window": 2}},
            "--quantize.options: window 2 is more than the model's 1 layer",
        ),
        ({"engine": "signround", "bits": (3.5,)}, "signround measures none: choose --quantize.engine native"),
        ({"sequences": 0}, "--quantize.sequences 0 must be positive"),
        ({"sequences": -3, "engine": "rtn"}, "--quantize.sequences -3 must be positive"),
        ({"sequences": 15}, "--quantize.sequences 15 .* 30 tokens, .* needs 32: give at least 16$"),
        ({"bits": (4, 1)}, "--quantize.bits 1, --quantize.group_size 128: bits must be from 2 to 8"),
        ({"bits": (9,)}, "--quantize.bits 9, .*: bits must be from 2 to 8"),
        ({"bits": (16,)}, "--quantize.bits 16, .*: bits must be from 2 to 8"),
        ({"group_size": 256}, "--quantize.group_size 256: .* input width 128 of .*q_proj.* such as 128"),
        ({"group_size": 0}, "--quantize.group_size 0: group_size must be positive"),
        ({"bits": (3.5,), "group_size": 100}, "--quantize.bits 3.5, --quantize.group_size 100: .*q_proj"),
        ({"bits": (3.5,), "engine": "rtn"}, "--quantize.bits 3.5, .*: choose --quantize.engine native"),
        ({"bits": (3.5,), "engine": "autoawq"}, "--quantize.bits 3.5, .*: choose --quantize.engine native"),
        ({"bits": (3.5,), "patterns": {"*": 8}}, "--quantize.bits 3.5, .* leave --quantize.patterns out"),
        ({"bits": (1.5,)}, "--quantize.bits 1.5, .* lies between 2 and 8"),
        ({"bits": (8.5,)}, "--quantize.bits 8.5, .* lies between 2 and 8"),
        ({"patterns": {"*.experts": 8}}, "--quantize.patterns .*experts.* matches none"),
        ({"patterns": {"*.down_proj": 8, "*.q_proj": 9}}, "--quantize.patterns '\\*.q_proj': .* got 9"),
    ],
)
def test_what_can_not_names_its_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("--quantize.", re.escape("--quantize."))):
        check(**options)


def test_more_reserved_tokens_need_fewer_sequences() -> None:
    check(reserved_tokens=MIN_TOKENS, sequences=1)
    with pytest.raises(ValueError, match=f"on {MIN_TOKENS - 1} tokens.* at least 2$"):
        check(reserved_tokens=MIN_TOKENS - 1, sequences=1)


@pytest.mark.parametrize("reserved_tokens", [0, -1])
def test_a_layer_must_see_some_tokens(reserved_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"--model.reserved_tokens {reserved_tokens} must be at least 1"):
        check(reserved_tokens)


def test_a_group_must_divide_every_width() -> None:
    """48 divides 384 alone."""
    with pytest.raises(ValueError, match=r"input width 128 of .*q_proj"):
        check(group_size=48)


def test_only_averages_need_candidates() -> None:
    options = QuantizationOptions()
    assert options.candidates([4, 3.0]) == ()
    assert options.candidates([]) == ()
    assert options.candidates([4, 3.5]) == (3, 4)


def test_only_round_to_nearest_needs_no_calibration() -> None:
    assert [engine for engine in ENGINES if not QuantizationOptions(engine=engine).calibrates] == ["rtn"]


def test_engines_that_are_no_references_fit_the_norm_and_only_if_asked() -> None:
    assert [engine for engine in ENGINES if QuantizationOptions(engine=engine).refits] == [
        "native",
        "signround",
    ]
    assert not QuantizationOptions(refit_norm=False).refits


def test_another_engine_takes_what_it_has() -> None:
    given = QuantizationOptions(engine="gptq", group_size=32, sequential=True, options={"act_order": True})
    assert given.of_engine("gptq") is given
    assert given.of_engine("native") == QuantizationOptions(engine="native", group_size=32, sequential=True)
    assert QuantizationOptions(engine="signround").search_options["sequential"]
    assert not QuantizationOptions(engine="signround", sequential=False).search_options["sequential"]
    assert not QuantizationOptions(engine="signround").of_engine("gptq").search_options["sequential"]
    assert given.of_engine("rtn") == QuantizationOptions(engine="rtn", group_size=32)


def test_settings_are_all_that_a_packed_model_depends_on() -> None:
    """Besides the model and the sequences; an option that is as declared says so, too."""
    settings = QuantizationOptions(engine="gptq", patterns={"*": 8}, options={"act_order": True}).settings(4)
    assert settings == {
        "engine": "gptq", "group_size": 128, "symmetric": False, "sequential": False,
        "options": {"percdamp": 0.01, "act_order": True}, "bits": 4, "patterns": {"*": 8}, "refit_norm": False,
        "refit_routers": False,
    }  # fmt: skip
    assert settings.keys() == {option.name for option in fields(QuantizationOptions)} - {"sequences"}
    assert QuantizationOptions(patterns={"*": 8}).settings(3.5)["patterns"] == {}


def test_round_to_nearest_has_the_engines_interface(make_routed: MakeRouted) -> None:
    precisions = [{"model.layers.0.mlp.up_proj": bits} for bits in (4, 3)]
    recipes = ENGINES["rtn"](
        make_routed(), [], precisions, 32, True, progress=lambda *_: pytest.fail("no layers")
    )
    assert [recipe.bits for recipe in recipes] == precisions
    for recipe in recipes:
        assert (recipe.engine, recipe.group_size, recipe.symmetric) == ("rtn", 32, True)
        assert (recipe.scales, recipe.clips, recipe.errors) == ({}, {}, {})
