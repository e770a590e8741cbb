"""What will run on a GPU runs on a pretended one: every tensor is moved, every kernel is asked for what it takes."""

import subprocess
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qtale_lightning.data import EncodedPrompt
from qtale_lightning.evaluation import trace
from qtale_lightning.evaluation.generation import generate
from qtale_lightning.evaluation.scoring import score_thresholds
from qtale_lightning.models import RoutedForCausalLM, Routing
from qtale_lightning.models.sources import load_tokenizer
from qtale_lightning.module import QTALEModule
from qtale_lightning.quantization.calibration import padded_batches
from qtale_lightning.quantization.checkpoint import quantize_model
from qtale_lightning.quantization.final_norm import refit_final_norm
from qtale_lightning.quantization.int4_cuda import Int4CUDA
from qtale_lightning.quantization.kernels import Dequantize, choose_kernel
from qtale_lightning.quantization.linear import QuantizedLinear
from qtale_lightning.quantization.mappings import linear_shapes
from qtale_lightning.quantization.precision import uniform
from qtale_lightning.quantization.recipe import round_to_nearest
from qtale_lightning.quantization.rtn import Scheme, quantize
from qtale_lightning.routing.statistics import router_statistics
from tests.gpu.conftest import Load
from tests.gpu.pretended import pretended_gpu

pytestmark = pytest.mark.slow


@pytest.fixture
def gpu() -> Iterator[str]:
    """The device's name."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: `make gpu-check` checks the real one")
    try:
        with pretended_gpu() as device:
            yield device
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"a GPU can't be pretended without a C++ compiler: {error}")


# The pretence


def test_both_devices_are_not_mixed(gpu: str) -> None:
    here, there = torch.ones(3), torch.ones(3, device=gpu)
    assert there.is_cuda
    assert (there + 1).device.type == "cuda"
    for mix in (
        lambda: here + there,
        lambda: torch.cat([there, here]),
        lambda: there.index_select(0, torch.tensor([1])),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mix()
    assert (there * torch.tensor(2.0)).tolist() == [2, 2, 2]  # a single number may be anywhere
    assert there[torch.tensor([0, 2])].tolist() == [1, 1]  # and so may indices
    assert there[[0, 2]].is_cuda


def test_what_is_on_it_can_be_moved_and_changed_and_not_viewed(gpu: str) -> None:
    module = torch.nn.Linear(2, 2).to(gpu)
    assert all(parameter.is_cuda for parameter in module.parameters())
    with pytest.raises(TypeError, match="numpy"):
        module.weight.detach().numpy()
    x = torch.zeros(2, 2, device=gpu)
    x[0].add_(1)
    x.view(-1)[3:].fill_(5)
    assert x.cpu().numpy().tolist() == [[1, 1], [0, 5]]


# The stage that compares


# Not gradients: PyTorch's engine needs a real device.
PARTS = ["flat_attention", "generation", "int4_linears"]
SLOW_PARTS = [
    pytest.param(part, marks=pytest.mark.slow) for part in ("executions", "caches", "int4_model", "search")
]


@pytest.mark.parametrize("part", [*PARTS, *SLOW_PARTS])
def test_comparisons(gpu: str, load: Load, part: str) -> None:
    checks = list(getattr(load("gpu_check.parity"), part)(gpu, True))
    assert checks
    assert [check for check in checks if not check.passed] == []


def test_the_int4_kernel_runs_on_it(gpu: str, load: Load) -> None:
    (check,) = load("gpu_check.parity").int4_linears(gpu, True)
    assert Int4CUDA.name in check.name


def test_an_older_gpu_has_no_int4_kernel(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch makes it for compute capability 8.0 and more."""
    weight = quantize(torch.randn(64, 128, device=gpu), Scheme(4, 32))
    assert isinstance(choose_kernel(weight), Int4CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert isinstance(choose_kernel(weight), Dequantize)


# What a run does


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_losses_and_statistics(gpu: str, load: Load, frozen: bool, training: bool) -> None:
    models = load("gpu_check.models")
    module = QTALEModule(name="tiny", router_width=32, train_all=not frozen)
    module.configure_model()
    module = module.to(gpu).train(training)
    batch = {
        "input_ids": models.tokens(),
        "attention_mask": models.padding("right"),
        "labels": models.tokens(),
    }
    routing = Routing()
    with torch.autocast("cuda", torch.bfloat16, enabled=frozen), torch.set_grad_enabled(training):
        losses = module.losses({name: value.to(gpu) for name, value in batch.items()}, routing, 0.5)
    assert losses.total.is_cuda
    assert bool(losses.total.detach().isfinite())
    router_statistics(routing, "flip_ratio")
    module.validation_ratio.update(routing)
    module.validation_routing.update(routing, 1)
    assert 0 < float(module.validation_ratio.compute().mean()) <= 1
    assert module.validation_routing.compute()["paths"]["tokens"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_traces_and_texts(gpu: str, load: Load, dtype: torch.dtype) -> None:
    models = load("gpu_check.models")
    model, rows = models.routed(gpu, dtype), models.tokens().tolist()
    prompts = [tuple(row[: 8 + i]) for i, row in enumerate(rows)]
    questions = [EncodedPrompt("task", 0, (one, one), ((5, 6), (7, 8, 9)), (1, 1)) for one in prompts]
    scores = score_thresholds(model, questions, [0.5, [0.5] * 4 + [0.1]])
    assert all(torch.tensor(one).isfinite().all() for found in scores for one in found.loglikelihoods)
    texts = [trace.Text("text", one, 5) for one in prompts]
    traces = trace.trace(model, texts)
    forced = trace.trace(model, texts, forced=traces)
    assert trace.measure_changes(model.config, texts, traces, traces, forced)["decisions_changed"] == 0
    assert len(generate(model, load_tokenizer("tiny"), prompts, 3)) == len(prompts)


@pytest.mark.slow
def test_a_packed_folder_and_a_fitted_norm(gpu: str, load: Load, tmp_path: Path) -> None:
    models = load("gpu_check.models")
    model = models.routed("cpu", torch.float32)
    recipe = round_to_nearest(uniform(linear_shapes(model), 4, {}), 64)
    there = models.routed(gpu, torch.float32)
    norm = refit_final_norm(there, recipe, padded_batches(models.tokens().tolist(), gpu))
    assert norm.is_cuda
    quantize_model(there, recipe, norm)
    quantize_model(model, recipe, norm.cpu())
    model.save_pretrained(tmp_path)
    loaded = RoutedForCausalLM.from_pretrained(tmp_path, dtype="auto").eval().to(gpu)
    ids = models.tokens().to(gpu)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, there(ids).logits)
    linears = [module for module in loaded.modules() if isinstance(module, QuantizedLinear)]
    assert {type(linear.kernel) for linear in linears} == {Int4CUDA}


@pytest.mark.slow
def test_latency_is_measured(gpu: str, load: Load) -> None:
    small: dict[str, Any] = {
        "prefill": ((2, 8),),
        "decode": (1,),
        "ratios": [0.5],
        "repeats": 1,
        "peers": True,
    }
    rows = load("latency").measure("tiny", None, Namespace(device=gpu, **small))
    prefill = ["dense", "masked", "bf16", "int4", "bf16, sizes known", "static"]
    assert [row["form"] for row in rows] == [*prefill, "dense", "bf16", "int4"]
