"""The stage that compares: what the suite computes on this device, with its references.

    error = max over tokens of ‖found - expected‖ / ‖expected‖

Limits follow from the precision: float32 sums of some hundred products in another order, bfloat16 rounds by 2⁻⁹ at
every step of six layers, and random weights amplify it (0.08 on a CPU). Decisions are forced where both sides would
make them from states that differ by rounding.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from gpu_check.models import BATCH, LENGTH, dense, gates, padding, routed, tokens
from gpu_check.stages import Context, StageFailed
from qtale_lightning.compat import kernels
from qtale_lightning.models import RoutedCache, Routing, attention, graph, sampling
from qtale_lightning.quantization import awq
from qtale_lightning.quantization.calibration import padded_batches
from qtale_lightning.quantization.checkpoint import quantize_model
from qtale_lightning.quantization.int4_cuda import Int4CUDA
from qtale_lightning.quantization.kernels import Dequantize, choose_kernel
from qtale_lightning.quantization.linear import QuantizedLinear
from qtale_lightning.quantization.mappings import linear_shapes
from qtale_lightning.quantization.precision import uniform
from qtale_lightning.quantization.recipe import round_to_nearest
from qtale_lightning.quantization.rtn import Quantized, Scheme, quantize

FLOAT32, BFLOAT16, INT4 = 1e-4, 0.15, 2**-6
SEARCH = 0.02  # of a linear's error: a tie between two scales may be broken otherwise
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (1024, 4096), (576, 1536))


class Check(NamedTuple):
    """A comparison: the largest error that it found, and its limit."""

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is within its limit; NaN isn't."""
        return self.error <= self.limit


def parity(context: Context) -> dict[str, Any]:
    """All comparisons; one that breaks is an error of its own, and the others go on."""
    found: dict[str, dict[str, Any]] = {}
    for part in PARTS:
        try:
            for check in part(context.device, context.quick):
                found[check.name] = {"error": check.error, "limit": check.limit, "passed": check.passed}
                print(f"{check.name}: {check.error:.2g} (limit {check.limit:.2g})", flush=True)
        except Exception as error:  # a kernel that refuses must not hide what the others compute
            print(f"{part.__name__}: {type(error).__name__}: {error}", flush=True)
            found[part.__name__] = {"error": f"{type(error).__name__}: {error}", "passed": False}
        context.save({"checks": found})
    if wrong := [name for name, check in found.items() if not check["passed"]]:
        raise StageFailed(f"{len(wrong)} of {len(found)} comparisons failed: {'; '.join(wrong)}")
    return {"checks": found}


def difference(found: Tensor, expected: Tensor) -> float:
    """The error, see above, of ``(..., D)``."""
    found, expected = (x.detach().double().cpu() for x in (found, expected))
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


@torch.no_grad()
def executions(device: str, quick: bool) -> Iterator[Check]:
    """Packed execution against masked execution, here and on the CPU, with and without padding."""
    for dtype, limit in ((torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)):
        here, there = routed(device, dtype), routed("cpu", torch.float32)
        worst = {"packed = masked": 0.0, "packed = the CPU": 0.0}
        for side in ("none", "left", "right"):
            for share in (0.5,) if quick else (0.1, 0.5, 0.9, 1.0):
                mask = padding(side)
                forced = gates(here, share)
                logits = {}
                for name, model, execution in (
                    ("packed", here, "packed"), ("masked", here, "masked"), ("CPU", there, "masked"),
                ):  # fmt: skip
                    decisions = {layer: gate.to(model.device) for layer, gate in forced.items()}
                    routing = Routing(execution=execution, forced=decisions)  # type: ignore[arg-type]
                    given = {"attention_mask": mask.to(model.device), "routing": routing, "use_cache": False}
                    logits[name] = model(tokens().to(model.device), **given).logits.cpu()[mask.bool()]
                for name, other in (("packed = masked", "masked"), ("packed = the CPU", "CPU")):
                    worst[name] = max(worst[name], difference(logits["packed"], logits[other]))
        for name, error in worst.items():
            yield Check(f"{name}, {dtype}".replace("torch.", ""), error, limit)


@torch.no_grad()
def flat_attention(device: str, quick: bool) -> Iterator[Check]:
    """The variable-length kernel against one sequence after the other, with and without grouped heads."""
    if device == "cpu":
        return  # it has none
    counts = (37, 0, 64, 1)
    for dtype in (torch.float16, torch.bfloat16):
        for groups in (8, 2):
            torch.manual_seed(0)
            made = [torch.randn(sum(counts), n, 64, device=device, dtype=dtype) for n in (8, groups, groups)]
            query, key, value = made
            exact = attention._one_by_one(query.float(), key.float(), value.float(), counts, 0.125)
            ends = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)
            found = kernels.variable_length_attention(query, key, value, ends, max(counts), 0.125)
            name = f"variable-length attention, {groups} heads of keys, {dtype}".replace("torch.", "")
            yield Check(name, difference(found, exact), 2e-2)


@torch.no_grad()
def caches(device: str, quick: bool) -> Iterator[Check]:
    """Calls that share a cache against one masked pass."""
    for dtype, limit in ((torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)):
        model, mask = routed(device, dtype), padding("left").to(device)
        forced, ids = (
            {layer: gate.to(device) for layer, gate in gates(model, 0.5).items()},
            tokens().to(device),
        )
        whole = Routing(execution="masked", forced=forced)
        expected = model(ids, attention_mask=mask, routing=whole, use_cache=False).logits
        cache, parts, start = RoutedCache(), [], 0
        later = (16, LENGTH) if quick else (16, *range(17, LENGTH + 1))
        for end in (12, 13, *later):
            part = Routing(forced={layer: gate[:, start:end] for layer, gate in forced.items()})
            given = {"attention_mask": mask[:, :end], "past_key_values": cache, "routing": part}
            parts.append(model(ids[:, start:end], **given).logits)
            start = end
        real = mask.bool()
        error = difference(torch.cat(parts, 1)[real], expected[real])
        yield Check(f"calls with a cache = one pass, {dtype}".replace("torch.", ""), error, limit)


@torch.no_grad()
def generation(device: str, quick: bool) -> Iterator[Check]:
    """`generate()` against choosing each next token from a masked pass over all before."""
    model, mask, ids = routed(device, torch.float32), padding("left").to(device), tokens().to(device)
    new = 3 if quick else 12
    greedy: dict[str, Any] = {
        "max_new_tokens": new,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    found: Any = model.generate(ids, attention_mask=mask, **greedy)
    for _ in range(new):
        passed = model(ids, attention_mask=mask, routing=Routing(execution="masked"), use_cache=False)
        ids = torch.cat([ids, passed.logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    yield Check("generated tokens that differ", float((found != ids).sum()), 0)


@torch.no_grad()
def graphs(device: str, quick: bool) -> Iterator[Check]:
    """A token by `models.graph` against the layers, at given decisions; then tokens in a row, by their own."""
    if device == "cpu" and not interprets():
        return
    for dtype, limit in ((torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16))[: 1 if quick else 2]:
        model, ids = routed(device, dtype), tokens().to(device)
        layers = range(model.config.num_hidden_layers)
        given = torch.tensor([[(i + row) % 2 for row in range(BATCH)] for i in layers]).to(device, torch.int8)
        for nodes in (False, True)[: 2 if device == "cuda" and graph.has_conditional_nodes() else 1]:
            stack = graph.stack_of(model, BATCH, 64, given[None])
            decoder, cache = graph.GraphDecoder(model, stack, conditional=nodes), RoutedCache()
            prompt = Routing(threshold=0.5)
            passed = model(ids, past_key_values=cache, routing=prompt, logits_to_keep=1)
            places = torch.full((BATCH,), LENGTH, device=device)
            decoder.begin(cache, places, passed.logits[:, -1], prompt.thresholds)
            token = decoder.tokens[:, None].clone()
            decoder.advance()
            forced = {i: given[i].bool()[:, None] for i in model.config.routed_layers}
            expected = model(token, past_key_values=cache, routing=Routing(forced=forced)).logits[:, -1]
            name = f"graph{', conditional nodes' if nodes else ''} = layers, {dtype}".replace("torch.", "")
            yield Check(name, difference(decoder.scores, expected), limit)
    if device == "cpu":  # Triton's interpreter would take minutes
        return
    model, mask = routed(device, torch.float32), padding("left").to(device)
    settings: dict[str, Any] = {
        "max_new_tokens": 24,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    found: Any = model.generate(tokens().to(device), attention_mask=mask, **settings)
    with mock.patch.object(sampling, "sample", return_value=None):
        by_layers: Any = model.generate(tokens().to(device), attention_mask=mask, **settings)
    yield Check("tokens of the graph that differ", float((found != by_layers).sum()), 0)


def interprets() -> bool:
    """Whether Triton's interpreter is there, and on."""
    if find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def gradients(device: str, quick: bool) -> Iterator[Check]:
    """Of a training step in float32 against those on the CPU."""
    found: dict[str, dict[str, Tensor]] = {}
    for where in ("cpu", device):
        model = routed(where, torch.float32).train()
        routing = Routing(
            execution="masked", sample=False, forced={i: g.to(where) for i, g in gates(model, 0.5).items()}
        )
        output = model(tokens().to(where), attention_mask=padding("right").to(where), routing=routing)
        loss = output.logits.logsumexp(-1).square().mean() + routing.stacked_logits().square().mean()
        loss.backward()
        found[where] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    error = max(
        difference(found[device][name].flatten(), grad.flatten()) for name, grad in found["cpu"].items()
    )
    yield Check("gradients = the CPU's", error, 10 * FLOAT32)


@torch.no_grad()
def int4_linears(device: str, quick: bool) -> Iterator[Check]:
    """The kernel of this device against the dequantizing reference, at the shapes of real models."""
    for outputs, inputs in SHAPES[-1:] if quick else SHAPES:
        for bits in (4,) if quick else (4, 3, 2):
            torch.manual_seed(0)
            weight = torch.randn(outputs, inputs, device=device) * 0.02
            group = 64 if inputs % 128 or outputs % 128 else 128
            codes, scales, zeros = quantize(weight, Scheme(bits, group))
            stored = Quantized(codes, scales.half().float(), zeros)
            reference, found = Dequantize(stored), [choose_kernel(stored)]
            if Int4CUDA.supports(stored) and not isinstance(found[0], Int4CUDA):
                found.append(Int4CUDA(stored))  # what is taken without Triton
            x = torch.randn(64, inputs, device=device).bfloat16()
            for kernel in found:
                errors = [difference(kernel(x[:n]), reference(x[:n].float())) for n in (1, 2, 8, 33, 64)]
                yield Check(f"{bits} bits, {outputs} × {inputs}: {kernel.name}", max(errors), INT4)


@torch.no_grad()
def int4_model(device: str, quick: bool) -> Iterator[Check]:
    """A quantized model by its kernels against the same codes dequantized."""
    models = {}
    for name in ("kernels", "reference"):
        model = models[name] = routed(device, torch.bfloat16)
        quantize_model(model, round_to_nearest(uniform(linear_shapes(model), 4, {}), 64))
        for module in model.modules():
            if name == "reference" and isinstance(module, QuantizedLinear):
                module.kernel = Dequantize(module.quantized())
    forced = {layer: gate.to(device) for layer, gate in gates(models["kernels"], 0.5).items()}
    found, expected = (
        model(tokens().to(device), routing=Routing(forced=forced)).logits for model in models.values()
    )
    yield Check("int4 model = dequantized", difference(found, expected), BFLOAT16)


@torch.no_grad()
def search(device: str, quick: bool) -> Iterator[Check]:
    """AWQ's search here against the same on the CPU: the errors that its choices leave."""
    errors: dict[str, dict[str, float]] = {}
    for where in ("cpu", device):
        model = dense(where, torch.float32, layers=1 if quick else 2)
        batches = padded_batches(tokens().tolist() * 2, where)
        (recipe,) = awq.search(model, batches, [uniform(linear_shapes(model), 4, {})], 64)
        errors[where] = recipe.errors
    ratio = max(abs(errors[device][name] / error - 1) for name, error in errors["cpu"].items())
    yield Check("AWQ's errors = the CPU's", ratio, SEARCH)


PARTS = (executions, flat_attention, caches, generation, graphs, gradients, int4_linears, int4_model, search)
