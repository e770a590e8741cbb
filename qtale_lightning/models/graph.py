"""Decoding on a GPU as one CUDA graph: a step of `cuda.stack` and the choice of the next token, captured once.

Nothing waits for the host between tokens: what layers were executed, how many keys they have, which token was chosen
and whether a sequence has ended are on the device. Families whose layers are `fused`'s have it; others are decoded
layer by layer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from qtale_lightning.models.cache import RoutedCache
from qtale_lightning.models.decoding import MOST_SEQUENCES
from qtale_lightning.models.parts import Parts, parts_of
from qtale_lightning.models.routing import Routing
from qtale_lightning.watch import Watch

BETWEEN_CHECKS = 32
"""Tokens between two looks at whether all sequences have ended."""

ROUND = 256
"""Capacities are multiples of it, so that a graph serves many calls."""

MOST_ENDS = 16
"""Tokens that may end a sequence."""

Choose = Callable[[Tensor], Tensor]
"""Next tokens ``(B,)`` of scores ``(B, V)`` in float32."""


def greedy(scores: Tensor) -> Tensor:
    """The likeliest tokens."""
    return scores.argmax(-1)


class Sampled:
    """Draws tokens after Hugging Face's own warpers, from the same random numbers as `torch.multinomial`."""

    def __init__(self, warpers: Sequence[Callable[[Any, Tensor], Tensor]]) -> None:
        self.warpers = warpers

    def __call__(self, scores: Tensor) -> Tensor:
        """``multinomial`` itself asks the host whether its probabilities are any."""
        for warp in self.warpers:
            scores = warp(None, scores)
        probabilities = scores.softmax(-1)
        return (probabilities / torch.empty_like(probabilities).exponential_(1)).argmax(-1)


class GraphDecoder:
    """A model's decoding of so many sequences, of at most so many tokens.

    On a device without graphs, and where ``captures`` is off, the same operations run one by one.

    Attributes:
        capacity: Most tokens of a sequence, prompt and new ones.
        tokens: Chosen last, ``(B,)``.
        counts: Of new ones, up to those that ended a sequence, ``(B,)``.
        ended: Whether they did, ``(B,)``.
        scores: That the last token was chosen by, ``(B, V)``; not those of the prompt.
    """

    def __init__(
        self,
        model: Any,
        stack: Any,
        choose: Choose = greedy,
        conditional: bool = False,
        captures: bool = True,
    ) -> None:
        """Make room, and capture a step.

        Args:
            model: A `RoutedForCausalLM`.
            stack: Of it, by `stack_of`.
            choose: The next tokens.
            conditional: Put each routed layer into a conditional node of the graph; see `has_conditional_nodes`.
            captures: Make a graph, on a GPU.
        """
        self.stack, self.choose, self._embed = stack, choose, model.get_input_embeddings()
        self.routed = [layer.layer_idx for layer in model.model.layers if layer.router is not None]
        device = stack.stream.device
        batch, self.capacity = len(stack.stream), stack.keys.shape[3]
        self.tokens, self.counts = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
        self.output = torch.zeros(batch, self.capacity + 1, dtype=torch.int64, device=device)
        self.ended = torch.zeros(batch, dtype=torch.bool, device=device)
        self.scores = stack.scores
        self.ends = torch.full((MOST_ENDS,), -1, dtype=torch.int64, device=device)
        self.pad = torch.zeros(1, dtype=torch.int64, device=device)
        self._conditional = conditional
        self._graph: Any = None
        if captures and device.type == "cuda":
            self._capture()

    @torch.inference_mode()
    def begin(
        self,
        cache: RoutedCache,
        places: Tensor,
        scores: Tensor,
        thresholds: Mapping[int, float],
        ends: Tensor | None = None,
        pad: int = 0,
    ) -> None:
        """Take over a prompt, and choose the first token.

        Args:
            cache: That the prompt left; not changed.
            places: Of the next token in each sequence, padding not counted, ``(B,)``.
            scores: Of the prompt's last token, float32 ``(B, V)``.
            thresholds: Layer → θ.
            ends: Tokens that end a sequence, `MOST_ENDS` at most; None: none does.
            pad: What follows them.
        """
        stack = self.stack
        count, batch = stack.lengths.shape
        lengths = [layer.lengths or (0,) * batch for layer in cache.layers]
        lengths += [(0,) * batch] * (count - len(lengths))
        stack.lengths.copy_(torch.tensor(lengths, dtype=torch.int32), non_blocking=True)
        for index, layer in enumerate(cache.layers):
            if (kept := layer.longest) > 0:
                assert layer.keys is not None
                assert layer.values is not None
                stack.keys[index, :, :, :kept] = layer.keys[:, :, :kept]
                stack.values[index, :, :, :kept] = layer.values[:, :, :kept]
        limits = [thresholds.get(index, 0.0) for index in range(count)]
        stack.thresholds.copy_(torch.tensor(limits), non_blocking=True)
        stack.positions.fill_(cache.seen)
        stack.places.copy_(places)
        stack.step.zero_()
        self.ends.fill_(-1)
        if ends is not None:
            self.ends[: ends.numel()] = ends.flatten().to(self.ends.device)
        self.pad.fill_(pad)
        self.ended.zero_()
        self.counts.zero_()
        self._take(self.choose(scores.float()))

    @torch.inference_mode()
    def advance(self) -> None:
        """One more token of every sequence."""
        self._advance() if self._graph is None else self._graph.replay()

    @torch.inference_mode()
    def run(self, new: int, watch: bool) -> Tensor:
        """Decode until ``new`` tokens are there, the first one counted, or all sequences have ended; ``(B, …)``.

        Args:
            new: At most.
            watch: Look, now and then, whether all have ended.
        """
        done = 1
        while done < new:
            until = min(new, done + BETWEEN_CHECKS) if watch else new
            for _ in range(until - done):
                self.advance()
            done = until
            if watch and bool(self.ended.all()):
                break
        length = min(new, int(self.counts.max())) if watch else new
        return self.output[:, :length].clone()

    def record(self, routing: Routing) -> None:
        """Leave the last token's decisions where a forward pass would."""
        routing.logits = {index: self.stack.logits[index].unsqueeze(1).clone() for index in self.routed}
        routing.gates = {index: self.stack.gates[index].bool().unsqueeze(1) for index in self.routed}

    def _advance(self, where: Any = None) -> None:
        scores = self.stack.advance(self._embed(self.tokens), where)
        self._take(self.choose(scores.float()))

    def _take(self, chosen: Tensor) -> None:
        """Note chosen tokens ``(B,)``; those of ended sequences are padding."""
        chosen = torch.where(self.ended, self.pad, chosen)
        place = self.stack.step.expand(len(chosen)).unsqueeze(1)
        self.output.scatter_(1, place, chosen.unsqueeze(1))
        self.counts.add_((~self.ended).long())
        self.ended.logical_or_((chosen[:, None] == self.ends).any(1))
        self.tokens.copy_(chosen)

    @torch.inference_mode()
    def _capture(self) -> None:
        """Compile the kernels on a stream aside, as PyTorch asks it of what is captured, then capture a step."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                self._advance()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()

        @contextmanager
        def where(gates: Tensor) -> Iterator[None]:
            graph.begin_capture_to_if_node((gates != 0).any())
            try:
                yield
            finally:
                graph.end_capture_to_conditional_node()

        with torch.cuda.graph(graph):
            self._advance(where if self._conditional else None)
        self._graph = graph


def has_conditional_nodes() -> bool:
    """Whether this PyTorch captures conditional nodes (from CUDA 12.4 on)."""
    return hasattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node")


def stack_of(model: Any, batch: int, capacity: int, forced: Tensor | None = None) -> Any:
    """The model's layers for the kernels, a `cuda.stack.Stack`; None where these don't take them.

    Args:
        model: A `RoutedForCausalLM`.
        batch: Sequences.
        capacity: Most tokens of a sequence, prompt and new ones.
        forced: Decisions that replace the routers', int8 ``(steps, L, B)``, -1 where there are none; repeated.
    """
    from qtale_lightning.cuda.attention import Rotary
    from qtale_lightning.cuda.stack import Shape, Stack

    stack, dtype = model.model, model.model.norm.weight.dtype
    for module in model.modules():  # quantized linears choose their kernels
        if getattr(module, "kernel", module) is None:
            module.prepare()
    parts = parts_of(stack, dtype)
    head = model.lm_head.operands(dtype) if hasattr(model.lm_head, "operands") else None
    config, attention = model.config, stack.layers[0].self_attn
    width = attention.head_dim
    if (
        parts is None
        or head is None
        or any(operands[0].ndim != 2 for part in parts for operands in part.weights)
    ):
        return None  # a kernel's own layout may be another one
    if batch > MOST_SEQUENCES or width < 32 or width & (width - 1):
        return None
    if getattr(stack.rotary_emb, "rope_type", "default") not in ("default", "linear", "llama3"):
        return None  # angles that change with a sequence's length
    positions = torch.arange(capacity, device=stack.norm.weight.device).unsqueeze(0)
    rotary = Rotary(*(angles[0].contiguous() for angles in stack.rotary_emb(stack.norm.weight, positions)))
    shape = Shape(
        config.num_attention_heads, config.num_key_value_heads, width, attention.scaling, stack.norm.variance_epsilon,
        config.reserved_tokens, config.keep_kv,
    )  # fmt: skip
    eps = [layer.router.norm.eps if layer.router is not None else 0.0 for layer in stack.layers]
    layers = [_weights(part, of_router) for part, of_router in zip(parts, eps, strict=True)]
    last = _weight(head, getattr(model.lm_head, "bias", None))
    return Stack(layers, stack.norm.weight, last, shape, rotary, batch, capacity, forced)


def _weights(parts: Parts, eps: float) -> Any:
    from qtale_lightning.cuda.decisions import RouterWeights
    from qtale_lightning.cuda.stack import LayerWeights

    query, key, value, output, gate, up, down = map(_weight, parts.weights, parts.biases)
    router = None
    if parts.router:
        wide, bias, norm, out, out_bias = parts.router
        router = RouterWeights(wide, bias, norm, eps, out, out_bias)
    before, behind = parts.norms
    heads = (parts.head_norms[0], parts.head_norms[1]) if parts.head_norms else None
    return LayerWeights((before, behind), heads, (query, key, value), output, gate, up, down, router)


def _weight(operands: Sequence[Tensor], bias: Tensor | None) -> Any:
    from qtale_lightning.cuda.linear import Weight

    values, scales, zeros = operands if len(operands) == 3 else (operands[0], None, None)
    return Weight(values, scales, zeros, bias)


# One a model: its cache is large.
_decoders: "WeakKeyDictionary[Any, tuple[Any, Watch, GraphDecoder]]" = WeakKeyDictionary()


def decoder_of(model: Any, batch: int, tokens: int, choose: Choose, how: Any) -> GraphDecoder | None:
    """A decoder for so many sequences of so many tokens: the last one of this model, where it still fits.

    Args:
        model: A `RoutedForCausalLM`.
        batch: Sequences.
        tokens: Of the longest one, at its end.
        choose: The next tokens.
        how: What ``choose`` does, to be compared.
    """
    capacity, config = -(-tokens // ROUND) * ROUND, model.config
    what = batch, how, config.keep_kv, config.reserved_tokens
    if (kept := _decoders.get(model)) is not None:
        known, watch, decoder = kept
        if known == what and watch.unchanged() and decoder.capacity >= tokens:
            return decoder
        del _decoders[model], kept, decoder  # its memory, before the next one's
    stack = stack_of(model, batch, capacity)
    watch = Watch(model.modules())  # where weights are now: a stack may move them
    if stack is None or not watch.unchanged():  # there may be hooks, which a graph wouldn't run
        return None
    decoder = GraphDecoder(model, stack, choose)
    _decoders[model] = what, watch, decoder
    return decoder
