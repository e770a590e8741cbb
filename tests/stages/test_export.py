"""An exported model, the dtype that it is loaded in to compute with it, and a disk without room for it."""

import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from qtale_lightning import precision, stages
from qtale_lightning.module import QTALEModule
from qtale_lightning.quantization.checkpoint import quantize_model
from qtale_lightning.quantization.mappings import decoder_layers, linear_shapes
from qtale_lightning.quantization.precision import uniform
from qtale_lightning.quantization.recipe import round_to_nearest, scale_vectors
from qtale_lightning.run import RunDirectory
from qtale_lightning.stages.merging import merge
from qtale_lightning.stages.quantize import _copied


def test_a_stored_model_computes_in_what_is_fast(
    make_run: Callable[..., RunDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exported in bfloat16, and packed: float32 without instructions for it, bfloat16 with them, and so on disk."""
    small = ("--data.limit_train", "64", "--data.calibration_rows", "8", "--quantize.engine", "rtn")
    monkeypatch.setattr(precision, "native_bfloat16", lambda device="cpu": False)
    run = make_run(tmp_path, "qtale", *small, "--quantize.bits", "[4]", dtype=torch.bfloat16)
    for folder in (run.model(), run.model(4, "rtn")):
        assert AutoConfig.from_pretrained(folder).dtype == torch.bfloat16
    for native, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(precision, "native_bfloat16", lambda device="cpu", native=native: native)
        for bits in (16, 4):
            model = stages.load_exported(run, bits, "rtn")
            assert model.dtype == model.lm_head.weight.dtype == dtype
            with torch.no_grad():
                assert model(torch.tensor([[5, 6, 7]])).logits.dtype == dtype


def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    """A limit to a file's size, as the system enforces it, stands for the disk's end."""
    run = RunDirectory(tmp_path / "run")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        with pytest.raises(OSError, match=rf"(large|space).*{run.model()}"):
            stages.export(run, QTALEModule(name="tiny", router_width=16), None, torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not any(run.root.glob("*"))
    stages.export(run, QTALEModule(name="tiny", router_width=16), None, torch.float32)
    assert (run.model() / "model.safetensors").is_file()


@pytest.mark.slow
def test_packing_leaves_the_model_as_it_was(make_run: Callable[..., RunDirectory], tmp_path: Path) -> None:
    """Its copy shares embeddings, head and what packing replaces, nothing that scales are divided out of."""
    run = make_run(tmp_path, "full", dtype=torch.bfloat16)
    model = stages.load_exported(run)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copied = _copied(model, torch.bfloat16)
    layer = copied.model.layers[0]
    shared = copied.lm_head.weight, copied.model.embed_tokens.weight, layer.mlp.down_proj.weight
    own = copied.model.norm.weight, layer.input_layernorm.weight
    there, same = {value.data_ptr() for value in model.parameters()}, model.dtype == torch.bfloat16
    assert [value.data_ptr() in there for value in shared] == [same, same, True]
    assert not any(value.data_ptr() in there for value in own)
    recipe = round_to_nearest(uniform(linear_shapes(model), 4, {}), 32)
    scales = {f"{name}.input_layernorm": torch.full((128,), 2.0) for name in ("model.layers.0",)}
    scale_vectors(decoder_layers(copied)[0], replace(recipe, scales=scales))
    assert not torch.equal(layer.input_layernorm.weight, model.model.layers[0].input_layernorm.weight)
    quantize_model(copied, recipe)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_released_module_is_loaded_anew() -> None:
    module = QTALEModule(name="tiny", router_width=16)
    module.configure_model()
    module.release()
    assert not hasattr(module, "model")
    assert not [*module.parameters()]
    module.configure_model()
    assert module.merge().config.num_hidden_layers == 6


def test_folding_layer_by_layer_is_folding_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights as in one go, rounded once; and a fold that isn't sound moves logits."""
    made = []
    for by_layer in (True, False):
        module = QTALEModule(name="tiny", train_all=False, router_width=16)
        module.configure_model()
        torch.manual_seed(1)
        for name, value in module.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, 0, 0.05)
        module.eval()
        if by_layer:
            model, drift = merge(module, torch.bfloat16)
            assert 0 <= drift < 1e-4
        else:
            model = module.merge()
        made.append(model)
    for (name, found), expected in zip(made[0].named_parameters(), made[1].parameters(), strict=True):
        assert torch.equal(found, expected if ".router." in name else expected.to(torch.bfloat16))
    module = QTALEModule(name="tiny", train_all=False, router_width=16)
    module.configure_model()
    module.eval()
    monkeypatch.setattr(
        "qtale_lightning.stages.merging.fold_lora", lambda layer: layer.self_attn.o_proj.weight.data.zero_()
    )
    assert merge(module, torch.float32)[1] > 1e-2


@pytest.mark.parametrize(("moved", "sound"), [(slice(5, 6), True), (slice(0, 20), False)])
def test_a_single_token_does_not_condemn_a_fold(moved: slice, sound: bool) -> None:
    """Rounding moves a token of huge states further than all others; what isn't sound moves them all."""
    module = QTALEModule(name="tiny", train_all=False, router_width=16)
    module.configure_model()
    module.eval()
    calls = []

    def disturb(layer: torch.nn.Module, given: object, output: torch.Tensor) -> torch.Tensor:
        calls.append(output)
        return output.index_add(1, torch.arange(32)[moved], output[:, moved]) if len(calls) == 2 else output

    module.model.model.layers[-1].self_attn.register_forward_hook(disturb)
    assert (merge(module, torch.float32)[1] < 1e-4) == sound
    assert len(calls) == 2
