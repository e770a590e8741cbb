"""Nested codes: what is stored, loaded and learned at several precisions from one folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtale_lightning.__main__ import main
from qtale_lightning.models import RoutedForCausalLM
from qtale_lightning.quantization.checkpoint import quantize_model
from qtale_lightning.quantization.engines import ENGINES
from qtale_lightning.quantization.linear import QuantizedLinear
from qtale_lightning.quantization.mappings import decoder_layers, linear_shapes
from qtale_lightning.quantization.nested import narrowed, pack_planes, unpack_planes
from qtale_lightning.quantization.options import QuantizationOptions
from qtale_lightning.quantization.precision import uniform
from qtale_lightning.quantization.recipe import Codes, Recipe, scale_vectors
from qtale_lightning.quantization.rounding import Rounding
from qtale_lightning.quantization.rtn import Quantized, Scheme, quantize
from qtale_lightning.results import load_results
from qtale_lightning.run import RunDirectory
from tests.quantization.conftest import GROUP, MakeModel, MakeRouted

FEW = {"steps": 4, "batch": 2}
STORED = 32  # a group that planes take


def test_a_narrower_weight_by_hand() -> None:
    """Codes 0, 5, 11 and 15 at scale 2 and zero 6: at 2 bits 0, 1, 2, 3, whose middles are 1.5, 5.5, 9.5, 13.5."""
    weight = Quantized(*(torch.tensor(values)[None] for values in ([[0.0, 5, 11, 15]], [[2.0]], [[6.0]])))
    narrow = narrowed(weight, 2)
    assert narrow.codes.flatten().tolist() == [0, 1, 2, 3]
    assert narrow.dequantize().tolist() == [[2 * (middle - 6) for middle in (1.5, 5.5, 9.5, 13.5)]]
    assert narrowed(weight, 0).dequantize().tolist() == weight.dequantize().tolist()


@pytest.mark.parametrize("lowest", [2, 3, 4])
def test_planes_are_the_highest_bits_of_codes(lowest: int) -> None:
    codes = torch.randint(16, (6, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    planes = pack_planes(codes, [*range(lowest, 5)])
    assert sum(plane.numel() for plane in planes) == codes.numel() // 2
    for read in range(lowest, 5):
        assert torch.equal(unpack_planes(planes[: read - lowest + 1], lowest), codes >> 4 - read)


def test_learning_sees_what_is_stored() -> None:
    """What `Rounding` writes for its codes' highest bits is what these stand for."""
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    for symmetric in (False, True):
        rounding, found = Rounding(weight, Scheme(4, 16, symmetric), reach=2.0), torch.empty_like(weight)
        rounding.step(torch.randn(24, 64, generator=torch.Generator().manual_seed(1)), 0.7, 2)
        for bits in (4, 3, 2):
            rounding.write(found, bits)
            expected = narrowed(rounding.codes().quantized(), 4 - bits).dequantize()
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------ as an engine's


def found_by(engine: str, model: Any, rows: Tensor, **options: Any) -> Recipe:
    precision = uniform(linear_shapes(model), 4, {})
    return ENGINES[engine](model, [{"input_ids": rows}], [precision], GROUP, sequential=True, **options)[0]


def test_where_nothing_is_nested_codes_are_signrounds(make_model: MakeModel, rows: Tensor) -> None:
    model = make_model()
    nested, plain = (
        found_by(engine, model, rows, **FEW, **more)
        for engine, more in (("nested", {"lowest": 4}), ("signround", {}))
    )
    assert nested.held == []
    for name, own in plain.codes.items():
        assert all(map(torch.equal, nested.codes[name], own)), name


@pytest.mark.slow
def test_all_widths_are_learned(make_model: MakeModel, rows: Tensor) -> None:
    """Nested codes' highest 2 bits do less damage than those of codes that were learned at 4 bits alone."""

    @torch.no_grad()
    def damage(recipe: Recipe, bits: int) -> float:
        model = make_model()
        exact = model(rows).logits.log_softmax(-1)
        for layer in decoder_layers(model):
            for name, linear in layer.linears.items():
                full = layer.path(name)
                weight = narrowed(recipe.codes[full].quantized(), 4 - bits)
                if bits in recipe.terms:
                    scales, zeros = (term.float()[..., None] for term in recipe.terms[bits][full])
                    weight = Quantized(weight.codes, scales, zeros)
                linear.weight.copy_(weight.dequantize())
            scale_vectors(layer, recipe)
        found = model(rows).logits.log_softmax(-1)
        return torch.nn.functional.kl_div(found, exact, log_target=True, reduction="batchmean").item()

    more = {"steps": 40, "batch": 2}
    plain = found_by("signround", make_model(), rows, **more)
    nested = found_by("nested", make_model(), rows, **more)
    assert nested.held == [2, 3, 4]
    assert damage(nested, 2) < 0.7 * damage(plain, 2)
    assert damage(nested, 3) < damage(plain, 3)
    assert damage(nested, 4) < 0.8 * damage(nested, 3)


# ------------------------------------------------------------------------------------------------ in a folder


@pytest.fixture
def folder(make_routed: MakeRouted, tmp_path: Path) -> Path:
    """A routed model of 4 bits rounded to nearest, whose highest 3 and 2 bits are to be read, too."""
    model, codes = make_routed(kv_heads=2), {}
    for name in linear_shapes(model):
        weight = quantize(model.get_submodule(name).weight.detach(), Scheme(4, STORED))
        codes[name] = Codes(
            weight.codes.flatten(1).byte(), weight.scales[..., 0], weight.zeros[..., 0].byte()
        )
    bits = dict.fromkeys(codes, 4)
    quantize_model(model, Recipe("nested", bits, STORED, codes=codes, held=[2, 3, 4]))
    model.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def linears(model: Any) -> dict[str, QuantizedLinear]:
    return {name: part for name, part in model.named_modules() if isinstance(part, QuantizedLinear)}


def test_one_folder_gives_every_precision(folder: Path, rows: Tensor) -> None:
    whole = linears(RoutedForCausalLM.from_pretrained(folder))
    for bits in (4, 3, 2):
        model = AutoModelForCausalLM.from_pretrained(folder, bits=bits).eval()
        for name, part in linears(model).items():
            assert part.bits == bits
            expected = narrowed(whole[name].quantized(), 4 - bits)
            assert all(map(torch.equal, part.quantized(), expected)), name
        with torch.no_grad():
            assert model(rows).logits.isfinite().all()


def test_only_the_bits_that_are_read_are_loaded(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    names = {name.rpartition(".")[2] for name in stored if "q_proj" in name}
    terms = {f"{kind}{width}" for kind in ("scales", "zeros") for width in (2, 3)}
    assert names == {"qweight", "plane3", "plane4", "qzeros", "scales"} | terms
    for bits in (2, 3):
        model = RoutedForCausalLM.from_pretrained(folder, bits=bits)
        found = {name for part in linears(model).values() for name, _ in part.named_buffers()}
        planes = {f"plane{width}" for width in range(3, bits + 1)}
        assert found == {"qweight", "qzeros", "scales", f"scales{bits}", f"zeros{bits}"} | planes
        with pytest.raises(ValueError, match="not serializable"):  # a part of it
            model.save_pretrained(folder / "again")


@torch.no_grad()
def test_a_widths_own_scales_and_zeros_are_kept(
    make_routed: MakeRouted, rows: Tensor, tmp_path: Path
) -> None:
    """From the search's file to a linear that reads 2 bits."""
    model = make_routed(kv_heads=2)
    found = found_by("nested", model, rows, **FEW)
    found.save(tmp_path / "recipe.safetensors")
    kept = Recipe.load(tmp_path / "recipe.safetensors")
    quantize_model(model, kept)
    model.save_pretrained(tmp_path)
    alone = linears(RoutedForCausalLM.from_pretrained(tmp_path, bits=2))
    for name, (scales, zeros) in found.terms[2].items():
        part = alone[name].quantized()
        assert torch.equal(part.codes.flatten(1), (found.codes[name].codes >> 2).float())
        assert torch.equal(part.scales.squeeze(-1), scales.float())
        assert torch.equal(part.zeros.squeeze(-1), zeros.float())
    derived = narrowed(found.codes["model.layers.1.mlp.up_proj"].quantized(), 2).scales.squeeze(-1)
    assert not torch.equal(derived.half(), found.terms[2]["model.layers.1.mlp.up_proj"][0])  # they are fitted


@torch.no_grad()
def test_a_whole_model_switches(folder: Path, rows: Tensor) -> None:
    """At every precision it computes what the model loaded at that one does; float32, so only sums' order differs."""
    model = RoutedForCausalLM.from_pretrained(folder).eval()
    for bits in (4, 2, 3, 4):
        for part in linears(model).values():
            part.read_at(bits)
        alone = RoutedForCausalLM.from_pretrained(folder, bits=bits).eval()
        torch.testing.assert_close(model(rows).logits, alone(rows).logits, rtol=1e-4, atol=1e-4)


def test_a_precision_that_isnt_held_is_refused(folder: Path, make_routed: MakeRouted, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no model at 5 bits, but at 2, 3, 4"):
        RoutedForCausalLM.from_pretrained(folder, bits=5)
    alone = RoutedForCausalLM.from_pretrained(folder, bits=3)
    with pytest.raises(ValueError, match=r"no model at 2 bits in memory, but at \[3\]"):
        next(iter(linears(alone).values())).read_at(2)
    make_routed().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="isn't quantized, and none at 3 bits"):
        RoutedForCausalLM.from_pretrained(tmp_path / "plain", bits=3)


def test_the_config_says_which_it_holds(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["held"], config["quant_method"]) == (4, [2, 3, 4], "qtale")


SHAPES = {"model.layers.0.self_attn.q_proj": (64, 64)}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"bits": (8,)}, "works at 2, 3, 4 bits, not at 8"),
        ({"bits": (2,), "options": {"lowest": 3}}, "nothing is held at 2 bits"),
        ({"options": {"lowest": 5}}, "lowest is from 2 to 4"),
        ({"patterns": {"*": 3}}, "patterns is of one precision"),
        ({"refit_routers": True}, "refit_routers is of one precision"),
    ],
)
def test_options_that_dont_fit_are_refused(given: dict[str, Any], said: str) -> None:
    options = QuantizationOptions(engine="nested", group_size=64, **{"bits": (4, 3), **given})
    with pytest.raises(ValueError, match=said):
        options.check(SHAPES, 2)


@pytest.mark.slow
def test_a_run_has_one_folder_for_all(
    options: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From fit to answers written by a schedule; another precision of the folder needs no other search."""
    small = (
        *("--data.batch_size", "8", "--data.limit_train", "64", "--data.limit_validation", "12"),
        *("--data.calibration_rows", "8", "--trainer.max_steps", "4", "--sweep.thresholds", "[0.5]"),
        *("--data.answers", "generated", "--data.prompt_style", "choice", "--wandb", "disabled"),
        *("--quantize.engine", "nested", "--quantize.bits", "[4,2]", "--quantize.group_size", "64"),
        *("--quantize.options", '{"steps": 2, "batch": 2}', "--quantize.sequences", "16"),
    )
    main(["fit", *options("tiny", "qtale", *small, "--out", str(tmp_path))])
    run = RunDirectory(tmp_path / "tiny-qtale-facts-s0")
    assert run.model(4, "nested") == run.model(2, "nested") == run.root / "model-nested"
    made = (run.model(4, "nested") / "model.safetensors").read_bytes()
    at_3 = ("--quantize.engine", "nested", "--theta", "0.5", "--bits")
    main(["evaluate", str(run.root), *at_3, "3"])
    main(["evaluate", str(run.root), *at_3[:-1], "--bits_schedule", "0:4,2:3:0.6"])
    assert (run.model(4, "nested") / "model.safetensors").read_bytes() == made
    rows = [row for row in load_results(run.root)["evaluation"] if row["split"] == "validation"]
    size = {(row["bits"], row["engine"]): row["weight_bytes"] for row in rows if row["bits"] != 16}
    assert size.keys() == {(4, "nested"), (3, "nested"), (2, "nested"), (4, "nested+0:4,2:3:0.6")}
    a_bit = (
        6 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256) // 8
    )  # bytes of one bit of each of tiny's weights
    assert size[3, "nested"] - size[2, "nested"] == a_bit
    assert (
        size[4, "nested"] - size[3, "nested"] == a_bit / 2
    )  # 4 bits have no terms but the codes' own, in groups of 64
    assert all(row["writing_tokens"] > 0 for row in rows)
    for wrong, said in (
        (["--bits", "5"], "holds no model at 5 bits"),
        (["--bits_schedule", "0:3,2:4"], "rises from 3 to 4 bits"),
        (["--bits_schedule", "0:8,2:4"], "no model at 8 bits"),
        (["--bits_schedule", "0:4,2:3", "--bits", "3"], "leave --bits out"),
        (["--bits_schedule", "0:4,2:3", "--data.answers", "scored"], "those of facts are scored"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(["evaluate", str(run.root), *at_3[:-1], *wrong])
        assert end.value.code == 2
        assert said in " ".join(capsys.readouterr().err.split())
