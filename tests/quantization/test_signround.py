"""SignRound: its update by hand and by PyTorch's gradients, and what it makes of whole models, routed ones too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from qtale_lightning import cpu
from qtale_lightning.__main__ import main
from qtale_lightning.models import Routing
from qtale_lightning.quantization import signround
from qtale_lightning.quantization.calibration import padded
from qtale_lightning.quantization.checkpoint import quantize_model
from qtale_lightning.quantization.engines import ENGINES
from qtale_lightning.quantization.linear import QuantizedLinear
from qtale_lightning.quantization.mappings import decoder_layers, linear_shapes
from qtale_lightning.quantization.precision import uniform
from qtale_lightning.quantization.recipe import Recipe, clip_weight
from qtale_lightning.quantization.rounding import Rounding
from qtale_lightning.quantization.rtn import Scheme, fake_quantize
from qtale_lightning.quantization.signround import shuffled
from qtale_lightning.results import load_results
from qtale_lightning.run import RunDirectory
from qtale_lightning.stages.export import load_exported
from tests.quantization.conftest import GROUP, Apply, MakeModel, MakeRouted

ENGINE = ENGINES["signround"]
SCHEMES = [Scheme(bits, 16, symmetric) for bits in (2, 3, 4) for symmetric in (False, True)]


def test_the_update_by_hand() -> None:
    """A 2 × 4 weight in one group a row, at 2 bits: levels 0 to 3, all numbers exact in binary.

    Row 0: min -1, max 2, so s = 1 and z = 1; w/s = -1, 0.5, 0.75, 2 go to -1, 0 (half to even), 1, 2, all within.
    Row 1: α = 1/2, so that min counts -1, max 2: s = 1, z = 1; -2 goes to -2, below the lowest level -1, and is held
    there; 0.25, 1, 2 go to 0, 1, 2.

    With the slopes g of Q(w), dQ/dv = s where no end holds, so that v moves by rate against sign(g); where one does, 0.
    dQ/ds at constant z is level - w/s, or the level where an end holds; where it holds z adds -α·min/s. With one
    end each:  dα = (held - by)·min,  dβ = by·max,  by = (Σ g·dQ/ds) / 3, in all.
    Row 0: Σ g·(level - w/s) = 1·0 + 2·(-0.5) + 4·0.25 + (-1)·0 = 0: no gradient, no step.
    Row 1: -1·1 + 1·(-0.25) + 0 + 0 = -1.25, and held 1 with z: -(1·(-1)/1) = 1, by = (-1.25 + 1)/3 = -1/12:
    dα = (1 + 1/12)·(-2) < 0, up by rate; dβ = -1/12·2 < 0, up by rate, to 1 at most.
    """
    weight = torch.tensor([[-1.0, 0.5, 0.75, 2.0], [-2.0, 0.25, 1.0, 2.0]])
    rounding = Rounding(weight, Scheme(2, 4))
    rounding.shares[0, 1] = 0.5
    rounded = torch.empty(2, 4)
    rounding.write(rounded)
    assert rounded.tolist() == [[-1, 0, 1, 2], [-1, 0, 1, 2]]
    rounding.step(torch.tensor([[1.0, 2.0, 4.0, -1.0], [1.0, 1.0, 0.0, -3.0]]), 0.125)
    assert rounding.values.flatten(1).tolist() == [[-0.125, -0.125, -0.125, 0.125], [0, -0.125, 0, 0.125]]
    assert rounding.shares[:, 0].flatten().tolist() == [1, 1]
    assert rounding.shares[:, 1].flatten().tolist() == [0.625, 1]
    codes, scales, zeros = rounding.codes()
    assert codes.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    torch.testing.assert_close(scales, torch.tensor([[1.0], [3.25 / 3]]))
    assert zeros.tolist() == [[1], [1]]


class Round(torch.autograd.Function):
    """Rounds; its gradient is that of doing nothing."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(_: Any, *slopes: Tensor) -> Tensor:
        return slopes[0]


def as_published(weight: Tensor, v: Tensor, shares: Tensor, scheme: Scheme) -> Tensor:
    """Q(w) by the paper's formulas, for PyTorch to differentiate; `(out, n_groups, group_size)`."""
    groups, top = weight.unflatten(1, (-1, scheme.group_size)), 2**scheme.bits - 1
    low = groups.amin(-1, keepdim=True).clamp(max=0) * shares[0]
    high = groups.amax(-1, keepdim=True).clamp(min=0) * shares[1]
    scale, zero = (high - low) / top, Round.apply(-low / ((high - low) / top))
    if scheme.symmetric:
        middle = 2 ** (scheme.bits - 1)
        scale, zero = torch.maximum(high, -low) / (middle - 1), torch.full_like(scale, middle)
    return scale * ((Round.apply(groups / scale + v) + zero).clamp(0, top) - zero)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_updates_are_those_of_pytorchs_gradients(scheme: Scheme, fast: bool) -> None:
    if fast and not cpu.available():
        pytest.skip("our CPU operations weren't built here")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 48, generator=generator)
    clips = torch.randint(9, (70, 3), generator=generator, dtype=torch.uint8)
    rounding, rate = Rounding(weight, scheme, clips), 0.07
    with mock.patch.object(Rounding, "_fast", fast):
        for _ in range(4):
            v, shares = (part.clone().requires_grad_() for part in (rounding.values, rounding.shares))
            rounded, expected = torch.empty_like(weight), as_published(weight, v, shares, scheme)
            slopes = torch.randn(70, 48, generator=generator)
            (expected.flatten(1) * slopes).sum().backward()
            rounding.write(rounded)
            rounding.step(slopes, rate)
            torch.testing.assert_close(rounded, expected.detach().flatten(1))
            assert v.grad is not None
            assert shares.grad is not None
            torch.testing.assert_close(
                rounding.values, (v - rate * v.grad.sign()).clamp(-0.5, 0.5).detach(), rtol=0, atol=1e-6
            )
            moved = (shares - rate * shares.grad.sign()).clamp(0, 1).detach()
            # A sum that is 0 but for rounding may go either way.
            assert (rounding.shares - moved).abs().gt(1e-6).sum() <= 1
    rounding.write(rounded)
    torch.testing.assert_close(rounding.codes().quantized().dequantize(), rounded, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_it_starts_from_the_clipped_weight_rounded_to_nearest(scheme: Scheme) -> None:
    """Clips cut one end of each group: of both, the zero point lies half-way between two codes, a last bit decides."""
    weight = torch.randn(20, 48, generator=torch.Generator().manual_seed(0)).add(2)
    weight[:, ::16] = -0.1
    found = torch.empty_like(weight)
    for clips in (None, torch.full((20, 3), 4, dtype=torch.uint8)):
        Rounding(weight, scheme, clips).write(found)
        torch.testing.assert_close(
            found, fake_quantize(clip_weight(weight, clips), scheme), rtol=1e-5, atol=1e-5
        )


# ------------------------------------------------------------------------------------------------ as an engine's

SOME = {"steps": 30, "batch": 2}
Find = Callable[..., Recipe]


def found_in(model: Any, rows: Tensor, bits: int = 2, engine: str = "signround", **options: Any) -> Recipe:
    precision = uniform(linear_shapes(model), bits, {})
    return ENGINES[engine](model, [{"input_ids": rows}], [precision], GROUP, **options)[0]


@pytest.fixture(scope="module")
def learned(make_model: MakeModel, rows: Tensor) -> Recipe:
    return found_in(make_model(), rows, **SOME)


def damage(model: Any, recipe: Recipe, rows: Tensor, apply: Apply) -> float:
    """KL divergence of a model's predictions under a recipe from its own."""
    with torch.no_grad():
        exact = model(rows).logits.log_softmax(-1)
        apply(model, recipe)
        found = model(rows).logits.log_softmax(-1)
    return torch.nn.functional.kl_div(found, exact, log_target=True, reduction="batchmean").item()


def test_it_does_less_damage_than_where_it_starts(
    learned: Recipe, make_model: MakeModel, rows: Tensor, apply: Apply
) -> None:
    start = damage(make_model(), found_in(make_model(), rows, engine="native"), rows, apply)
    assert damage(make_model(), learned, rows, apply) < 0.7 * start


@pytest.mark.parametrize(
    "options", [{"sequential": True}, {"window": 2}, {"symmetric": True, "bits": 3}], ids=str
)
def test_so_it_does_with_other_options(
    options: dict[str, Any], make_model: MakeModel, rows: Tensor, apply: Apply
) -> None:
    more = {name: value for name, value in options.items() if name in ("symmetric", "bits")}
    start = damage(
        make_model(kv_heads=2), found_in(make_model(kv_heads=2), rows, engine="native", **more), rows, apply
    )
    recipe = found_in(make_model(kv_heads=2), rows, **SOME, **options)
    assert damage(make_model(kv_heads=2), recipe, rows, apply) < 0.8 * start


def test_a_seed_gives_the_same_codes_again(learned: Recipe, make_model: MakeModel, rows: Tensor) -> None:
    again, other = found_in(make_model(), rows, **SOME), found_in(make_model(), rows, **SOME, seed=1)
    name = "model.layers.1.mlp.down_proj"
    assert all(map(torch.equal, again.codes[name], learned.codes[name]))
    assert not torch.equal(other.codes[name].codes, learned.codes[name].codes)


def test_its_codes_are_kept_and_packed(
    learned: Recipe, make_model: MakeModel, rows: Tensor, tmp_path: Path
) -> None:
    learned.save(tmp_path / "recipe.safetensors")
    kept, model = Recipe.load(tmp_path / "recipe.safetensors"), make_model()
    assert kept.engine == "signround"
    assert kept.scales.keys() == learned.scales.keys()
    quantize_model(model, kept)
    for name, own in learned.codes.items():
        packed = model.get_submodule(name)
        assert isinstance(packed, QuantizedLinear)
        assert torch.equal(packed.quantized().codes.flatten(1).to(torch.uint8), own.codes)


def test_padding_counts_nothing(make_routed: MakeRouted, rows: Tensor) -> None:
    """Sequences of several lengths: what stands behind them changes no code."""
    sequences = [row[: 8 + i] for i, row in enumerate(rows)]
    batch = padded(sequences)
    other = batch | {"input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7)}
    precision = uniform(linear_shapes(make_routed()), 3, {})
    ours, theirs = (ENGINE(make_routed(), [one], [precision], GROUP, **SOME)[0] for one in (batch, other))
    assert all(torch.equal(own.codes, theirs.codes[name].codes) for name, own in ours.codes.items())


def test_batches_hold_each_sequence_once() -> None:
    sequences = [torch.arange(first, first + 3 + first % 4) for first in range(11)]
    batches = shuffled([padded(sequences[:6]), padded(sequences[6:])], 4, seed=0)
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 3]
    held = [ids[mask.bool()].tolist() for batch in batches for ids, mask in zip(*batch.values(), strict=True)]
    assert sorted(held) == [one.tolist() for one in sequences]
    assert held != [one.tolist() for one in sequences]


@pytest.mark.parametrize("options", [{}, {"sequential": True}, {"sequential": True, "window": 2}], ids=str)
def test_a_routed_layer_learns_from_its_executing_tokens_alone(
    options: dict[str, Any], make_routed: MakeRouted, rows: Tensor
) -> None:
    """The window sees the tokens that the model's own routers send there, and decides nothing itself."""
    model, seen, wanted = make_routed(), list[int](), list[int]()
    layer = decoder_layers(model)[1].module
    routing = Routing(align=False)
    with torch.no_grad():
        model(rows, routing=routing)
    executing = int(routing.gates[1].sum())
    assert 0.2 * rows.numel() < executing < 0.9 * rows.numel()
    real = type(layer).execute

    def watched(self: Any, hidden: Tensor, *more: Any) -> Tensor:
        if self.layer_idx == 1:
            (seen if torch.is_grad_enabled() else wanted).append(hidden.shape[1])
        return real(self, hidden, *more)

    with mock.patch.object(type(layer), "execute", watched):
        recipe = found_in(model, rows, steps=4, batch=2, **options)
    assert recipe.tokens["model.layers.1"] == executing
    assert sum(seen) == executing  # four steps of two of the eight sequences
    assert set(seen) <= set(wanted)


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("sequential", [False, True])
def test_windows_learn_on_quantized_inputs_what_the_model_gives(
    sequential: bool, window: int, make_routed: MakeRouted, rows: Tensor, apply: Apply
) -> None:
    """The published form's inputs are what the quantized layers before a window give, its targets the model's own."""
    fitted: list[tuple[Any, ...]] = []
    real = signround.fit

    def watched(learner: Any, calls: Any, wanted: Any, *more: Any) -> None:
        fitted.append(([hidden.clone() for hidden, _ in calls[None]], wanted))
        real(learner, calls, wanted, *more)

    with mock.patch.object(signround, "fit", watched):
        recipe = found_in(make_routed(), rows, steps=3, batch=2, sequential=sequential, window=window)
    assert len(fitted) == -(-3 // window)  # of three layers
    model, some = make_routed(), shuffled([{"input_ids": rows}], 2, 0)
    own, other = Routing(keep=(1, 2)), Routing(keep=(1, 2))
    with torch.no_grad():
        model.model(**some[0], routing=own)
        apply(model, recipe)
        other.forced = own.gates  # what the model's own routers decide
        model.model(**some[0], routing=other)
    exact, found = own.states, other.states
    inputs, wanted = fitted[1]
    assert not torch.allclose(found[window], exact[window], rtol=1e-2)
    torch.testing.assert_close(inputs[0], (found if sequential else exact)[window], rtol=1e-4, atol=1e-4)
    if window == 1:
        torch.testing.assert_close(wanted[0], exact[2], rtol=1e-4, atol=1e-4)


def test_a_model_without_a_finite_error_is_refused(make_model: MakeModel, rows: Tensor) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(1e30)
    with pytest.raises(ValueError, match=r"model\.layers\.1.* finite"):
        found_in(model, rows, **SOME)


@pytest.mark.slow
def test_a_run_keeps_what_it_learned(
    options: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Quantized again it learns nothing again; with its routers fitted it packs anew what it learned."""
    small = (
        *("--data.batch_size", "8", "--data.limit_train", "64", "--data.limit_validation", "24"),
        *("--data.calibration_rows", "8", "--trainer.max_steps", "4", "--sweep.thresholds", "[0.5]"),
        *("--wandb", "disabled", "--quantize.engine", "signround", "--quantize.bits", "[3]"),
        *("--quantize.options", '{"steps": 2}'),
    )
    main(["fit", *options("tiny", "qtale", *small, "--out", str(tmp_path))])
    run = RunDirectory(tmp_path / "tiny-qtale-facts-s0")
    assert {row["engine"] for row in load_results(run.root)["evaluation"]} == {"none", "signround"}
    with mock.patch.object(signround, "fit", side_effect=AssertionError):
        main(["quantize", str(run.root)])
        assert "signround, 3 bits: there already" in capsys.readouterr().out
        main(["quantize", str(run.root), "--quantize.refit_routers", "true"])
        assert "of the routers' decisions" in capsys.readouterr().out
    with mock.patch.object(signround, "fit") as learning:
        main(["quantize", str(run.root), "--quantize.options", '{"steps": 3}'])
    assert learning.call_count == len(decoder_layers(load_exported(run)))
