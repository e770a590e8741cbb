"""All decoder layers on a token of each sequence, in Triton: nothing waits for the host, so that it can be captured.

A layer is y = w · layer(x) + (1 − w) · x (`models.routed_layer`) with w on the device: a kernel decides, and those of
the layer return at once where nobody executes it, the residual stream left as it is; but those of keys and values where
tokens leave them in layers that they skip, too.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qtale_lightning.cuda.attention import Rotary, attend
from qtale_lightning.cuda.decisions import Decisions, RouterWeights, always, decide
from qtale_lightning.cuda.linear import Weight, gated_linear, linear


@dataclass(frozen=True)
class LayerWeights:
    """Of a decoder layer.

    Attributes:
        norms: Weights ``(D,)`` of the norms before attention and MLP.
        head_norms: Weights ``(d,)`` of the norms of queries and keys; None: there are none.
        projections: Of queries, keys and values.
        output: Of attention.
        gate, up, down: Of the MLP.
        router: None: every token executes the layer.
    """

    norms: tuple[Tensor, Tensor]
    head_norms: tuple[Tensor, Tensor] | None
    projections: tuple[Weight, Weight, Weight]
    output: Weight
    gate: Weight
    up: Weight
    down: Weight
    router: RouterWeights | None


@dataclass(frozen=True)
class Shape:
    """What layers have in common.

    Attributes:
        heads, groups: Of queries, and of keys and values.
        width: Of a head.
        scaling: Of attention's scores.
        eps: Of all norms.
        reserved: Initial tokens of a sequence that execute every layer.
        keeps: Whether tokens leave keys and values in layers that they skip, too.
    """

    heads: int
    groups: int
    width: int
    scaling: float
    eps: float
    reserved: int
    keeps: bool


class Stack:
    """Layers, final norm and head, with a cache and room for what they compute.

    Attributes:
        keys, values: The cache ``(L, B, H_kv, capacity, d)``.
        lengths: Tokens in it, int32 ``(L, B)``.
        gates: Whether the last token executed each layer, int32 ``(L, B)``.
        logits: Of the routers, float32 ``(L, B, 2)``; unused rows are 0.
        thresholds: θ of each layer, float32 ``(L,)``.
        positions: By which the next token is rotated, int64 ``(B,)``.
        places: Of the next token in its sequence, padding not counted, int64 ``(B,)``.
        step: Tokens so far, int64 ``(1,)``.
        scores: Of what follows the last token, ``(B, V)``.
    """

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        norm: Tensor,
        head: Weight,
        shape: Shape,
        rotary: Rotary,
        batch: int,
        capacity: int,
        forced: Tensor | None = None,
    ) -> None:
        """Take weights as they lie, and make room.

        Args:
            layers: In order.
            norm: Weight ``(D,)`` of the final norm; its dtype is that of the tokens.
            head: ``(V, D)``.
            shape: Of the layers.
            rotary: Of at least ``capacity`` positions, in the tokens' dtype.
            batch: B.
            capacity: Tokens of a sequence that a layer's cache has room for.
            forced: Decisions that replace the routers', int8 ``(steps, L, B)``, -1 where there are none; repeated.
        """
        self.layers, self.norm, self.head, self.shape, self.rotary = layers, norm, head, shape, rotary
        self.forced, count = forced, len(layers)

        def room(*sizes: int, dtype: torch.dtype = norm.dtype) -> Tensor:
            return torch.zeros(sizes, device=norm.device, dtype=dtype)

        self.keys, self.values = (
            norm.new_empty(count, batch, shape.groups, capacity, shape.width) for _ in range(2)
        )
        self.lengths, self.gates = (room(count, batch, dtype=torch.int32) for _ in range(2))
        self.logits, self.thresholds = (
            room(*sizes, dtype=torch.float32) for sizes in ((count, batch, 2), (count,))
        )
        self.positions, self.places = (room(batch, dtype=torch.int64) for _ in range(2))
        self.step = room(1, dtype=torch.int64)
        self.stream = room(batch, len(norm))
        self._heads = room(batch, (shape.heads + 2 * shape.groups) * shape.width)
        self._attention = room(batch, shape.heads * shape.width)
        self._inner = room(batch, len(layers[0].up.values))
        self.scores = room(batch, len(head.values))
        self._wide = {
            layer.router.down.dtype: room(batch, len(layer.router.down), dtype=layer.router.down.dtype)
            for layer in layers
            if layer.router is not None
        }

    def advance(
        self, hidden_states: Tensor, where: Callable[[Tensor], AbstractContextManager[None]] | None = None
    ) -> Tensor:
        """Scores ``(B, V)`` of what follows embedded tokens ``(B, D)``; they join the cache, and positions go on.

        Args:
            hidden_states: Of the tokens.
            where: Makes what is computed inside of it depend on gates ``(B,)``: a node of the CUDA graph.
        """
        self.stream.copy_(hidden_states)
        for index, layer in enumerate(self.layers):
            self._layer(index, layer, where)
        linear(self.stream, [self.head], self.scores, norm=self.norm, eps=self.shape.eps)
        self.positions.add_(1)
        self.places.add_(1)
        self.step.add_(1)
        return self.scores

    def _layer(
        self, index: int, layer: LayerWeights, where: Callable[[Tensor], AbstractContextManager[None]] | None
    ) -> None:
        gates, lengths, shape = self.gates[index], self.lengths[index], self.shape
        to = Decisions(
            gates, self.logits[index], lengths, self.thresholds[index : index + 1], self.places,
            None if self.forced is None else self.forced[:, index], self.step, shape.keeps,
        )  # fmt: skip
        if layer.router is None:
            always(to)
        else:
            decide(self.stream, layer.router, self._wide[layer.router.down.dtype], to, shape.reserved)
        before, behind = layer.norms
        attends = partial(
            attend, self._heads, self.rotary, self.positions, layer.head_norms, shape.eps, self.keys[index],
            self.values[index], lengths, gates, self._attention, shape.scaling, shape.keeps,
        )  # fmt: skip
        if shape.keeps:  # nothing of it waits for a gate but the query
            query, *key_value = layer.projections
            linear(self.stream, [query], self._heads, gates, before, shape.eps)
            linear(self.stream, key_value, self._heads, None, before, shape.eps, first=len(query.values))
            attends()
        with nullcontext() if where is None or layer.router is None else where(gates):
            if not shape.keeps:
                linear(self.stream, layer.projections, self._heads, gates, before, shape.eps)
                attends()
            linear(self._attention, [layer.output], self.stream, gates, residual=True)
            gated_linear(self.stream, layer.gate, layer.up, self._inner, gates, behind, shape.eps)
            linear(self._inner, [layer.down], self.stream, gates, residual=True)
