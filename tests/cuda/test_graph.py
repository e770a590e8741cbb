"""Decoding by `graph` against `generate()` layer by layer: equal tokens, decisions and lengths of caches, in float32.

Without a GPU the same operations run one by one in Triton's interpreter, a few milliseconds each: models are tiny.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from qtale_lightning import cpu, cuda
from qtale_lightning.models import RoutedCache, RoutedForCausalLM, Routing, graph, sampling
from qtale_lightning.quantization.int4_cpu import Int4CPU
from qtale_lightning.quantization.int4_cuda import Int4Rows
from qtale_lightning.quantization.kernels import Dequantize
from qtale_lightning.quantization.linear import QuantizedLinear
from tests.models.test_decoding import ids, made, quantize
from tests.tolerance import close, depth

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT, NEW = 7, 4


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU has is here, and what a CPU has isn't."""
    monkeypatch.setattr(cuda, "available", lambda device: True)
    monkeypatch.setattr(sampling, "LEAST_TOKENS", 1)
    monkeypatch.setattr(cpu, "available", lambda: False)
    monkeypatch.setattr(Int4CPU, "supports", staticmethod(lambda weight: False))


def mask(batch: int) -> Tensor:
    """The first of several sequences is padded on the left."""
    found = torch.ones(batch, PROMPT, dtype=torch.long, device=DEVICE)
    found[0, : 3 if batch > 1 else 0] = 0
    return found


def generated(model: RoutedForCausalLM, batch: int, by_graph: bool, new: int = NEW, **options: Any) -> Tensor:
    """By one of the two; that it was by it is checked."""
    prompts = ids(PROMPT, batch=batch).to(DEVICE)
    settings = {"max_new_tokens": new, "pad_token_id": 0, "eos_token_id": None, "attention_mask": mask(batch)}
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        found: list[Any] = []
        original = sampling.sample
        patch.setattr(
            sampling, "sample", lambda *a: found.append(original(*a) if by_graph else None) or found[-1]
        )
        tokens = model.generate(prompts, **settings | options)  # type: ignore[operator]
    assert (found[0] is not None) is by_graph
    return tokens


def quantized(family: str) -> RoutedForCausalLM:
    model = made(family)
    quantize(model, 4)
    return model.to(DEVICE)


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("family", "batch", "bits"),
    [("llama with biases", 3, 16), ("qwen3", 3, 16), ("mistral", 1, 16), ("llama", 1, 4)],
)
def test_tokens(family: str, batch: int, bits: int) -> None:
    model = quantized(family) if bits == 4 else made(family).to(DEVICE)
    reference = copy.deepcopy(model)
    for part in reference.modules():
        if isinstance(part, QuantizedLinear):
            part.kernel, part.device = Dequantize(part.quantized()), torch.device(DEVICE)
    routing = Routing()
    found = generated(model, batch, True, routing=routing)
    expected = generated(reference, batch, False)
    assert torch.equal(found, expected)
    if bits == 4:
        kernels = {type(part.kernel) for part in model.modules() if isinstance(part, QuantizedLinear)}
        assert kernels == {Int4Rows}
    lengths = graph._decoders[model][2].stack.lengths.cpu()
    assert (lengths[0] == mask(batch).sum(1).cpu() + NEW - 1).all()
    assert int((lengths[1:] < lengths[0]).sum()) > 0  # layers were skipped
    assert routing.gates.keys() == routing.logits.keys() == {1, 2, 3}
    del graph._decoders[model]


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
def test_tokens_whose_keys_are_kept_in_skipped_layers() -> None:
    model = made("llama with biases", keep_kv=True)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias = None  # keys and values in two products
    model.to(DEVICE)
    routing = Routing()
    assert torch.equal(generated(model, 3, True, routing=routing), generated(model, 3, False))
    lengths = graph._decoders[model][2].stack.lengths.cpu()
    assert (lengths == mask(3).sum(1).cpu() + NEW - 1).all()
    assert not all(gate.all() for gate in routing.gates.values())
    del graph._decoders[model]


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
def test_ends_and_chances(monkeypatch: pytest.MonkeyPatch) -> None:
    """One captured step for tokens by chance, from the same random numbers; another for the likeliest."""
    model = made().to(DEVICE)
    chance = {"do_sample": True, "top_k": 9, "top_p": 0.8, "temperature": 1.3}
    if DEVICE == "cpu":  # a GPU's multinomial draws otherwise
        assert torch.equal(generated(model, 3, True, **chance), generated(model, 3, False, **chance))
    free = generated(model, 3, False)
    ends = [int(free[0, PROMPT + 1]), int(free[1, PROMPT + 2]), int(free[2, PROMPT + 2])]
    monkeypatch.setattr(graph, "BETWEEN_CHECKS", 2)  # it stops later than the last sequence ends
    found, expected = (generated(model, 3, way, eos_token_id=ends) for way in (True, False))
    assert torch.equal(found, expected)
    assert found.shape[1] < free.shape[1]
    del graph._decoders[model]


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_step_in_half_precision(dtype: torch.dtype) -> None:
    """As close to the same weights in float32 as the layers are: within twice their error, and Triton's interpreter,
    which rounds bfloat16 towards zero, within four times."""
    model = made("llama", dtype).to(DEVICE)
    exact = copy.deepcopy(model).float()
    prompt, token = ids(PROMPT).to(DEVICE), ids(1, 5).to(DEVICE)
    forced = torch.tensor([[-1, -1, -1], [0, 1, 1], [1, 0, 1], [1, 1, 0]], dtype=torch.int8, device=DEVICE)
    decisions = {layer: forced[layer][:, None].bool() for layer in (1, 2, 3)}
    scores: dict[str, Tensor] = {}
    for name, one in (("exact", exact), ("layers", model), ("graph", model)):
        cache = RoutedCache()
        output = one(prompt, past_key_values=cache, routing=Routing(threshold=0.0))
        if name == "graph":
            decoder = graph.GraphDecoder(one, graph.stack_of(one, 3, 16, forced[None]))
            decoder.begin(cache, torch.full((3,), PROMPT, device=DEVICE), output.logits[:, -1], {})
            scores[name] = decoder.stack.advance(one.get_input_embeddings()(token.squeeze(1)), None)
        else:
            scores[name] = one(token, past_key_values=cache, routing=Routing(forced=decisions)).logits[:, -1]
    errors = {name: (scores[name].float() - scores["exact"]).norm() for name in ("layers", "graph")}
    factor = 4 if DEVICE == "cpu" and dtype == torch.bfloat16 else 2
    assert 0 < errors["graph"] <= factor * errors["layers"]


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize("keep_kv", [False, True])
def test_forced_decisions_and_states(threshold: float, keep_kv: bool) -> None:
    """Scores, router logits and caches of a step whose decisions are given, against the layers'."""
    model = made("qwen3", keep_kv=keep_kv).to(DEVICE)
    model.config.threshold = threshold
    prompt, token = ids(PROMPT).to(DEVICE), ids(1, 5).to(DEVICE)
    forced = torch.tensor([[-1, -1, -1], [0, 1, 1], [1, 0, 1], [-1, -1, -1]], dtype=torch.int8, device=DEVICE)
    cache, reference = RoutedCache(), RoutedCache()
    for each in (cache, reference):
        output = model(prompt, past_key_values=each, routing=Routing(threshold=0.5))
    decoder = graph.GraphDecoder(model, graph.stack_of(model, 3, 16, forced[None]))
    thresholds = model.config.thresholds(threshold)
    places = torch.full((3,), PROMPT, device=DEVICE)
    decoder.begin(cache, places, output.logits[:, -1], thresholds)
    scores = decoder.stack.advance(model.get_input_embeddings()(token.squeeze(1)), None)
    decisions = {layer: forced[layer][:, None].bool() for layer in (1, 2)}
    routing = Routing(forced=decisions)
    expected = model(token, past_key_values=reference, routing=routing).logits[:, -1]
    terms = depth(model.config)
    close(scores, expected, terms)
    for layer, kept in enumerate(reference.layers):
        assert decoder.stack.lengths[layer].tolist() == list(kept.lengths)
        for row, length in enumerate(kept.lengths):
            close(decoder.stack.keys[layer, row, :, :length], kept.keys[row, :, :length], terms)
            close(decoder.stack.values[layer, row, :, :length], kept.values[row, :, :length], terms)
    for layer, logits in routing.logits.items():
        close(decoder.stack.logits[layer], logits[:, 0], terms)
        assert torch.equal(decoder.stack.gates[layer].bool(), routing.gates[layer][:, 0])


@pytest.mark.usefixtures("kernels")
def test_what_is_left_to_hugging_faces_loop() -> None:
    model = made().to(DEVICE)
    for options in (
        {"repetition_penalty": 1.2},
        {"return_dict_in_generate": True},
        {"routing": Routing(forced={1: torch.ones(1, 1, dtype=torch.bool, device=DEVICE)})},
        {"past_key_values": RoutedCache()},
        {"num_beams": 2},
    ):
        calls: list[Any] = []
        original = sampling.sample
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "sample", lambda *a: calls.append(original(*a)) or calls[-1])  # noqa: B023
            model.generate(ids(PROMPT, batch=1).to(DEVICE), max_new_tokens=2, pad_token_id=0, **options)  # type: ignore[operator]
        assert calls in ([None], [])
    handle = model.model.layers[2].mlp.register_forward_hook(lambda *_: None)
    generated(model, 1, False, new=2)
    assert graph.decoder_of(model, 1, 20, graph.greedy, ()) is None
    handle.remove()
    model.config.hidden_act = "gelu"
    assert graph.stack_of(model, 1, 20) is None


@pytest.mark.usefixtures("kernels")
def test_a_decoder_is_kept_until_something_changes() -> None:
    model = made().to(DEVICE)
    first = graph.decoder_of(model, 1, 20, graph.greedy, ())
    assert first is not None
    assert graph.decoder_of(model, 1, 200, graph.greedy, ()) is first
    model.model.layers[2].mlp.up_proj.weight.mul_(0.5)
    second = graph.decoder_of(model, 1, 20, graph.greedy, ())
    assert second is not first
    assert graph.decoder_of(model, 1, 20, graph.greedy, ("other",)) is not second
    other = graph.decoder_of(model, 2, 20, graph.greedy, ("other",))
    assert other is not second
    model.config.keep_kv = True
    assert graph.decoder_of(model, 2, 20, graph.greedy, ("other",)) is not other


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 8])
def test_graphs_replay_what_their_operations_compute(batch: int, dtype: torch.dtype) -> None:
    """The same kernels in the same order: equal, in half precision, too, and with nodes that depend on gates."""
    model = made("llama", dtype).to("cuda")
    tokens = []
    for captures, conditional in ((False, False), (True, False), (True, True)):
        if conditional and not graph.has_conditional_nodes():
            continue
        stack = graph.stack_of(model, batch, 64)
        decoder = graph.GraphDecoder(model, stack, conditional=conditional, captures=captures)
        cache = RoutedCache()
        output = model(ids(PROMPT, batch=batch).cuda(), past_key_values=cache)
        places = torch.full((batch,), PROMPT, device="cuda")
        decoder.begin(cache, places, output.logits[:, -1], model.config.thresholds(0.5))
        with sync_refused():
            for _ in range(20):
                decoder.advance()
        tokens.append(decoder.output[:, :20].clone())
    assert all(torch.equal(found, tokens[0]) for found in tokens)


class sync_refused:
    """Inside, PyTorch raises where the host waits for the device."""

    def __enter__(self) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_sync_debug_mode("default")
