"""Packed models in memory, in a folder, and loaded again: the same to the last bit."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from qtale_lightning.evaluation.cost import weight_bytes
from qtale_lightning.models import RoutedForCausalLM
from qtale_lightning.quantization.checkpoint import PackedConfig, quantize_model
from qtale_lightning.quantization.linear import QuantizedLinear
from qtale_lightning.quantization.mappings import linear_shapes
from qtale_lightning.quantization.packing import pack_gemm, pack_tight
from qtale_lightning.quantization.precision import uniform
from qtale_lightning.quantization.recipe import Recipe, round_to_nearest
from qtale_lightning.quantization.rtn import Scheme, quantize
from qtale_lightning.run import RunDirectory

# Divides both widths, 64 and 96. Outputs of 64 run by the CPU's int4 kernel, those of 96 and 32 are dequantized.
GROUP = 32
MIXED = {"*.down_proj": 8, "model.layers.1.*": 3}
# Name: bits, exceptions by pattern, symmetric.
PRECISIONS: dict[str, tuple[int, dict[str, int], bool]] = {
    "4": (4, {}, False),
    "3": (3, {}, False),
    "2": (2, {}, False),
    "8": (8, {}, False),
    "symmetric": (4, {}, True),
    "mixed": (4, MIXED, False),
}

MakeModel = Callable[..., LlamaForCausalLM]
MakeRouted = Callable[..., RoutedForCausalLM]
Search = Callable[..., Recipe]
Apply = Callable[[nn.Module, Recipe], None]


def rtn(model: nn.Module, precision: str = "4") -> Recipe:
    bits, patterns, symmetric = PRECISIONS[precision]
    return round_to_nearest(uniform(linear_shapes(model), bits, patterns), GROUP, symmetric)


def to_bfloat16(model: RoutedForCausalLM) -> RoutedForCausalLM:
    """As `from_pretrained` does it: routers and the rotary frequencies stay in float32, where `.to` would cast them."""
    for name, parameter in model.named_parameters():
        if ".router." not in name:
            parameter.data = parameter.data.bfloat16()
    model.config.dtype = torch.bfloat16
    return model


def generate(model: Any, prompt: Tensor) -> Tensor:
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, pad_token_id=0, max_new_tokens=5, do_sample=False)


def load(folder: Path, **options: Any) -> RoutedForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def packing_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.fixture
def folder(make_routed: MakeRouted, tmp_path: Path) -> Path:
    """A routed model in 4 bits (`gemm`), its routers from layer 1 on."""
    quantize_model(model := make_routed(kv_heads=2), rtn(model))
    model.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def tie(model: RoutedForCausalLM, tied: bool) -> RoutedForCausalLM:
    model.config.tie_word_embeddings = tied
    model.tie_weights()
    return model


# From memory to a folder and back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_loaded_is_what_was_saved(
    precision: str, dtype: torch.dtype, make_routed: MakeRouted, rows: Tensor, tmp_path: Path
) -> None:
    """Logits with few tokens and with many (kernel and blocks), and generated text."""
    model = make_routed(kv_heads=2)
    model = to_bfloat16(model) if dtype == torch.bfloat16 else model
    quantize_model(model, rtn(model, precision))
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert isinstance(loaded, RoutedForCausalLM)
    assert loaded.dtype == dtype
    for few_or_many in (rows[:1, :4], rows):
        assert torch.equal(loaded(few_or_many).logits, model(few_or_many).logits)
    text = generate(loaded, rows[:2, :6])
    assert text.shape == (2, 11)
    assert torch.equal(text, generate(model, rows[:2, :6]))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_config_says_how(precision: str, make_routed: MakeRouted, tmp_path: Path) -> None:
    """Four bits with zero points are AWQ's own format, all else the project's; linears are loaded accordingly."""
    recipe = rtn(model := make_routed(), precision)
    quantize_model(model, recipe)
    model.save_pretrained(tmp_path)
    expected: dict[str, Any] = {
        "bits": recipe.bits if precision == "mixed" else PRECISIONS[precision][0],
        "group_size": GROUP,
        "zero_point": precision != "symmetric",
        "engine": "",
        "refit_norm": False,
        "quant_method": "awq" if precision == "4" else "qtale",
    }
    if precision == "4":
        expected |= {"version": "gemm", "modules_to_not_convert": ["lm_head", "router"]}
    assert packing_of(tmp_path) == expected
    loaded = {n: m for n, m in load(tmp_path).named_modules() if isinstance(m, QuantizedLinear)}
    assert {name: module.bits for name, module in loaded.items()} == recipe.bits
    assert {module.layout for module in loaded.values()} == {"gemm" if precision == "4" else "tight"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@torch.no_grad()
def test_another_dtype_is_for_activations(folder: Path, rows: Tensor, dtype: torch.dtype) -> None:
    loaded, stored = load(folder, dtype=dtype), load_file(folder / "model.safetensors")
    for name, tensor in loaded.state_dict().items():
        kind = name.rpartition(".")[2]
        kept = kind in ("qweight", "qzeros", "scales") or ".router." in name
        assert tensor.dtype == (stored[name].dtype if kept else dtype), name
        assert not kept or torch.equal(tensor, stored[name]), name
    assert loaded(rows).logits.dtype == dtype


@pytest.mark.parametrize("bits", [3, 4])
@torch.no_grad()
def test_a_folder_of_before_codes_could_be_nested_loads(
    bits: int, make_routed: MakeRouted, rows: Tensor, tmp_path: Path
) -> None:
    """Written here tensor by tensor, as it was then: `gemm` and `tight`, and a configuration that knows no nesting."""
    model = make_routed(kv_heads=2)
    model.save_pretrained(tmp_path)
    tensors, shapes = load_file(tmp_path / "model.safetensors"), linear_shapes(model)
    for name, (outputs, inputs) in shapes.items():
        codes, scales, zeros = quantize(tensors.pop(f"{name}.weight"), Scheme(bits, GROUP))
        scales = scales[..., 0].half()
        model.get_submodule(name).weight.copy_(((codes - zeros) * scales[..., None].float()).flatten(1))
        codes, zeros = codes.flatten(1), zeros[..., 0]
        assert codes.shape == (outputs, inputs)
        packed = (
            (pack_gemm(codes), pack_gemm(zeros), scales.T.contiguous())
            if bits == 4
            else (pack_tight(codes, bits), pack_tight(zeros.flatten(), bits), scales)
        )
        tensors |= {
            f"{name}.{kind}": t for kind, t in zip(("qweight", "qzeros", "scales"), packed, strict=True)
        }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    known = {"bits": bits, "group_size": GROUP, "zero_point": True, "engine": "rtn", "refit_norm": False}
    kind = {"quant_method": "awq", "version": "gemm"} if bits == 4 else {"quant_method": "qtale"}
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": known | kind}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for loaded in (load(tmp_path), load(tmp_path, bits=bits)):
        torch.testing.assert_close(loaded(rows).logits, model(rows).logits, rtol=1e-4, atol=1e-4)


def test_a_loaded_model_can_be_saved_until_it_runs(folder: Path, rows: Tensor, tmp_path: Path) -> None:
    loaded = load(folder)
    loaded.save_pretrained(again := tmp_path / "again")
    assert packing_of(again) == packing_of(folder)
    tensors, stored = load_file(again / "model.safetensors"), load_file(folder / "model.safetensors")
    assert tensors.keys() == stored.keys()
    assert all(torch.equal(tensors[name], stored[name]) for name in stored)
    loaded(rows)
    with pytest.raises(RuntimeError, match=r"runs already.*load its folder again"):
        loaded.save_pretrained(tmp_path / "running")


@pytest.mark.parametrize("name", ["4", "3", "2"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_takes_the_bytes_that_are_counted(
    name: str, tied: bool, make_routed: MakeRouted, tmp_path: Path
) -> None:
    run, bits = RunDirectory(tmp_path), int(name)
    model = tie(to_bfloat16(make_routed(kv_heads=2)), tied)
    model.save_pretrained(run.model())
    assert run.weight_bytes() == weight_bytes(model.config, 16)
    quantize_model(model, rtn(model, name))
    model.save_pretrained(run.model(bits, "rtn"))
    assert run.weight_bytes(bits, "rtn") == weight_bytes(model.config, bits, GROUP)
    tensors = load_file(run.model(bits, "rtn") / "model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == run.weight_bytes(bits, "rtn")


@torch.no_grad()
def test_a_tied_head_stays_tied(make_routed: MakeRouted, rows: Tensor, tmp_path: Path) -> None:
    """And what isn't quantized, embeddings and routers too, stays as it is."""
    model = tie(make_routed(), True)
    before = copy.deepcopy(model.state_dict())
    quantize_model(model, rtn(model))
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    kept = before.keys() & loaded.state_dict().keys()
    assert before.keys() - kept == {f"{name}.weight" for name in linear_shapes(make_routed())}
    assert all(torch.equal(loaded.state_dict()[name], before[name]) for name in kept)
    assert torch.equal(loaded(rows).logits, model(rows).logits)


# In memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [4, 3])
@torch.no_grad()
def test_a_dense_model_is_its_recipe(
    bits: int, bias: bool, make_model: MakeModel, search: Search, apply: Apply, rows: Tensor
) -> None:
    """Against the same values in plain linears: they differ by the scales' rounding to float16, 2⁻¹¹, alone."""
    model = make_model(bias=bias)
    recipe = search(model, rows, bits)
    apply(expected := copy.deepcopy(model), recipe)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantize_model(model, recipe)
    for layer in ("model.layers.0", "model.layers.1"):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weight = before[f"{layer}.{norm}.weight"] / recipe.scales[f"{layer}.{norm}"]
            assert torch.equal(model.get_parameter(f"{layer}.{norm}.weight"), weight)
            assert not torch.equal(weight, before[f"{layer}.{norm}.weight"])
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(model.get_parameter(name), before[name])
    for name in linear_shapes(expected):
        packed, plain = model.get_submodule(name), expected.get_submodule(name)
        assert isinstance(packed, QuantizedLinear)
        assert isinstance(plain, nn.Linear)
        torch.testing.assert_close(packed.dequantize(), plain.weight, rtol=1.001 * 2**-11, atol=1e-7)
        if bias:
            assert torch.equal(packed.get_parameter("bias"), plain.bias)
    error = model(rows).logits - expected(rows).logits
    assert error.norm() <= 2**-9 * expected(rows).logits.norm()


def test_twice_is_refused(make_model: MakeModel) -> None:
    recipe = rtn(model := make_model())
    quantize_model(model, recipe)
    with pytest.raises(ValueError, match="q_proj is quantized already: quantize the full-precision model"):
        quantize_model(model, recipe)


def test_the_recipe_of_another_model_is_refused(make_model: MakeModel, search: Search, rows: Tensor) -> None:
    """Before anything is changed."""
    model = make_model(layers=2)
    before = copy.deepcopy(model.state_dict())
    for recipe in (rtn(make_model(layers=1)), search(make_model(layers=3), rows)):
        with pytest.raises(ValueError, match=r"the recipe is of another model: .* search again"):
            quantize_model(model, recipe)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_what_float16_can_not_scale_is_named(make_model: MakeModel) -> None:
    model = make_model()
    model.model.layers[1].mlp.up_proj.weight[5, 3] = 1e7
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: a group's scale leaves"):
        quantize_model(model, rtn(model))


# Folders that don't fit ----------------------------------------------------------------------------------------------


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    packing = {name: changes.pop(name) for name in ("bits", "group_size") if name in changes}
    config["quantization_config"] |= packing
    file.write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_layer": 2}, r"left over \['model\.layers\.1\.router"),
        ({"start_layer": 0}, r"missing \['model\.layers\.0\.router"),
        ({"router_width": 8}, "misshaped .*router"),
        ({"group_size": 16}, "misshaped .*scales"),
        ({"bits": 3}, "misshaped .*qweight"),
        (
            {"group_size": 40},
            "group_size 40 doesn't divide the input width 64 of model.layers.0.self_attn.q_proj",
        ),
        ({"bits": 9}, "bits must be from 2 to 8, got 9"),
    ],
)
def test_another_configuration_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize("tensor", ["qweight", "qzeros", "scales"])
@pytest.mark.parametrize("damage", ["missing", "misshaped", "left over"])
def test_damaged_tensors_are_refused(folder: Path, tensor: str, damage: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.2.mlp.down_proj.{tensor}"
    if damage == "missing":
        del tensors[name]
    elif damage == "misshaped":
        tensors[name] = tensors[name][:-1].contiguous()
    else:
        name = name.replace("down_proj", "other_proj")
        tensors[name] = torch.ones(3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"don't match its config\.json .*: {damage} \[.*{name}"):
        load(folder)


def test_shapes_are_compared_where_transformers_does_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in its older versions, whose report of the loading knows no wrong shape where there is a quantizer."""
    load_pretrained = LlamaForCausalLM.from_pretrained.__func__  # type: ignore[attr-defined]

    def without_comparing(cls: Any, *args: Any, **kwargs: Any) -> Any:
        model, info = load_pretrained(cls, *args, **kwargs)
        layer = model.model.layers[2].mlp.down_proj
        layer.qzeros = layer.qzeros[:-1]
        return model, info

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(without_comparing))
    with pytest.raises(ValueError, match=r"misshaped \['model.layers.2.mlp.down_proj.qzeros'\]"):
        load(folder)


def test_a_config_that_is_given_is_read_alike(folder: Path, rows: Tensor) -> None:
    """As `AutoModelForCausalLM` gives it, and with the loading info that `from_pretrained` may be asked for."""
    config = AutoConfig.from_pretrained(folder)
    pair: Any = RoutedForCausalLM.from_pretrained(folder, config=config, output_loading_info=True)
    model, info = pair
    assert not info["missing_keys"]
    with torch.no_grad():
        assert torch.equal(model(rows).logits, load(folder)(rows).logits)
    assert isinstance(model.config.quantization_config, PackedConfig)


def test_a_folder_by_keyword_is_read_alike(folder: Path, rows: Tensor) -> None:
    by_keyword = RoutedForCausalLM.from_pretrained(pretrained_model_name_or_path=folder).eval()
    inside = RoutedForCausalLM.from_pretrained(folder.parent, subfolder=folder.name).eval()
    for model in (by_keyword, inside):
        assert isinstance(model.config.quantization_config, PackedConfig)
        with torch.no_grad():
            assert torch.equal(model(rows).logits, load(folder)(rows).logits)
