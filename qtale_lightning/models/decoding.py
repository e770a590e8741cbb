"""The next token of each sequence by one call for all decoder layers, `cpu/decoder.h`, where that computes the same.

The layers are those of `routed_layer` and `fused`; here is only said when C++ may run them, and what it needs of them.
"""

from collections.abc import Iterable, Mapping
from operator import is_
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.hooks import RemovableHandle

from qtale_lightning import cpu
from qtale_lightning.models.cache import RoutedCache
from qtale_lightning.models.fused import FusedAttention, FusedLayer, FusedMLP, FusedRMSNorm
from qtale_lightning.models.packing import Packing
from qtale_lightning.models.routing import Routing

MOST_SEQUENCES = 16
"""Of a step: with more, products of many tokens are faster one by one."""

POSITIONS = 256
"""Whose rotations are made together."""

_FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Transformers' rotary embeddings that give a position the same angles in every sequence."""

_LINEARS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
"""In the order of `cpu/stack.h`."""


def next_token(
    model: Any,
    hidden_states: Tensor,
    position_ids: Tensor | None,
    routing: Routing,
    cache: RoutedCache | None,
    options: Mapping[str, Any],
) -> Tensor | None:
    """Hidden states ``(B, 1, D)`` behind the final norm; None where the model's own forward has to compute them.

    Decisions are recorded, and the cache filled, as that would do it.

    Args:
        model: The stack, a `RoutedModel`.
        hidden_states: Embedded tokens ``(B, 1, D)``.
        position_ids: ``(B, 1)`` or ``(1, 1)``; None: counted from the tokens seen.
        routing: Complete.
        cache: Of all tokens before.
        options: What else the call was given.
    """
    if cache is None or not (_is_plain(model, hidden_states, routing, options) and _holds_all(model, cache)):
        return None
    stack = _stack_of(model, hidden_states.dtype)
    if stack is None or not stack.reaches(routing):
        return None
    if position_ids is None:
        position_ids = torch.full((1, 1), cache.seen, device=hidden_states.device)
    return stack.step(hidden_states, stack.angles.at(hidden_states, position_ids), routing, cache)


def _is_plain(model: Any, hidden_states: Tensor, routing: Routing, options: Mapping[str, Any]) -> bool:
    """Whether a call is one of decoding, of which nothing is asked but hidden states and θ's decisions."""
    batch, length, _ = hidden_states.shape
    config = model.config
    return (
        length == 1
        and batch <= MOST_SEQUENCES
        and routing.execution == "packed"
        and not (routing.sample or model.training)
        and not routing.keep
        and not routing.resume
        and routing.branch is None
        and routing.asked is None
        and (not routing.thresholds or (routing.method.compares and routing.perturber is None))
        and not any(value is not None and value is not False for value in options.values())
        and not (config.output_hidden_states or config.output_attentions)
        and cpu.ready(hidden_states)
    )


def _holds_all(model: Any, cache: RoutedCache) -> bool:
    """Whether every layer has kept a token before, so that its buffers are there."""
    return len(cache.layers) == len(model.layers) and all(layer.is_initialized for layer in cache.layers)


class Watch:
    """Sees whether modules are what they were: the same children, weights and kernels, and nothing hooked to them."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        tables = [table for module in modules for table in (module._modules, module._parameters) if table]
        self.tables, self.contents = tables, [dict(table) for table in tables]
        self.owners: list[dict[str, Any]] = []
        self.names: list[str] = []
        for module in modules:
            own = [name for name in ("kernel", "activation_bits", "_low") if name in vars(module)]
            self.owners += [vars(module)] * len(own)
            self.names += own
        self.values = [*map(dict.get, self.owners, self.names)]
        self.attributes = [vars(module) for module in modules]
        self.counts = [*map(len, self.attributes)]  # more by one where a module is given a forward of its own
        self.own_forward = any("forward" in attributes for attributes in self.attributes)
        self.hooks = [
            hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self.handles = -1  # as many as there were when none of them was in `hooks`

    def unchanged(self) -> bool:
        """Whether that is still so; asked at every token, by when what it looks at has left the caches."""
        try:
            same = self.tables == self.contents  # identical objects are equal, and no others but numbers
        except RuntimeError:  # of other tensors than before, which have no truth
            return False
        return (
            same
            and all(map(is_, map(dict.get, self.owners, self.names), self.values))
            and [*map(len, self.attributes)] == self.counts
            and not (self.own_forward or self._hooked() or _has_any_global_hook())
        )

    def _hooked(self) -> bool:
        """Whether hooks are there; looked for where any were made since, which PyTorch counts."""
        handles = RemovableHandle.next_id
        if handles != self.handles and not any(self.hooks):
            self.handles = handles
        return handles != self.handles


class _Angles:
    """A rotary embedding's cosines and sines, made for a block of positions at a time: one alone takes as long."""

    def __init__(self, rotary: Any) -> None:
        self.rotary, self.block = rotary, range(0)
        self.source: Tensor | None = None  # frequencies that the block's were made from
        self.cos = self.sin = torch.empty(0)

    def at(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of positions ``(1|B, 1)``: ``(d)`` where they are one, else ``(B, 1, d)``."""
        place, *others = position_ids.flatten().tolist()
        fixed = getattr(self.rotary, "rope_type", None) in _FIXED_ROTATIONS
        if not fixed or any(other != place for other in others):
            return self.rotary(hidden_states, position_ids)
        if place not in self.block or self.rotary.inv_freq is not self.source:
            first = place - place % POSITIONS
            self.block, self.source = range(first, first + POSITIONS), self.rotary.inv_freq
            of_block = torch.arange(first, first + POSITIONS, device=hidden_states.device).unsqueeze(0)
            self.cos, self.sin = (angles[0] for angles in self.rotary(hidden_states, of_block))
        return self.cos[place - self.block.start], self.sin[place - self.block.start]


class _Stack:
    """A model's decoder layers and final norm in C++, for tokens of one dtype."""

    def __init__(self, model: Any, decoder: Any) -> None:
        self.decoder, self.angles = decoder, _Angles(model.rotary_emb)
        self.routed = [layer.layer_idx for layer in model.layers if layer.router is not None]
        self.windows = {layer.layer_idx: layer.window for layer in model.layers if layer.window is not None}

    def reaches(self, routing: Routing) -> bool:
        """Whether the layers that are decided about are those with routers, and every token sees all before it."""
        return list(routing.thresholds) == self.routed and all(
            routing.length <= window for window in self.windows.values()
        )

    def step(
        self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor], routing: Routing, cache: RoutedCache
    ) -> Tensor:
        """See :func:`next_token`."""
        layers = cache.layers
        for layer in layers:
            layer.reserve_next()
        output, logits, gates = self.decoder.step(
            hidden_states.contiguous(),
            *(angles.contiguous() for angles in rotary),
            routing.tokens.contiguous(),
            routing.free.contiguous(),
            list(routing.thresholds.values()),
            self._forced(routing),
            [layer.keys for layer in layers],
            [layer.values for layer in layers],
            [kept for layer in layers for kept in layer.lengths],
        )
        new = gates.tolist()
        gates = gates.unsqueeze(-1)
        for index in self.windows:
            if any(new[index]):
                layers[index].remember(routing.places, Packing.of(gates[index]))
        for layer, counts in zip(layers, new, strict=True):
            layer.lengths = tuple(map(int.__add__, layer.lengths, counts))
        routing.logits.update(zip(self.routed, logits.unsqueeze(2).unbind(), strict=True))
        of_layer = gates.unbind()
        routing.gates.update((layer, of_layer[layer]) for layer in self.routed)
        return output

    def _forced(self, routing: Routing) -> Tensor | None:
        """Decisions that replace the routers', int8 ``(R, B)``, -1 where there are none."""
        forced = routing.forced
        if not forced or not self.routed:
            return None
        unknown = torch.full_like(routing.tokens, -1, dtype=torch.int8)
        return torch.stack([forced.get(layer, unknown) for layer in self.routed]).to(torch.int8)


_stacks: "WeakKeyDictionary[Any, dict[torch.dtype, tuple[Watch, _Stack | None]]]" = WeakKeyDictionary()


def _stack_of(model: Any, dtype: torch.dtype) -> _Stack | None:
    """A model's layers in C++, made anew where something about them has changed; None: it can't run them."""
    known = _stacks.setdefault(model, {})
    if dtype not in known or not known[dtype][0].unchanged():
        stack = _made(model, dtype)
        known[dtype] = Watch(model.modules()), stack
        if not known[dtype][0].unchanged():  # there are hooks
            return None
    return known[dtype][1]


def _made(model: Any, dtype: torch.dtype) -> _Stack | None:
    """A model's layers in C++; None where it doesn't know them, or doesn't take their shapes or dtypes."""
    parts = parts_of(model, dtype)
    if parts is None:
        return None
    layers, config, lanes = model.layers, model.config, cpu.LANES
    width, groups = layers[0].self_attn.head_dim, config.num_key_value_heads
    sizes = [config.hidden_size, config.intermediate_size]
    if config.routed_layers:
        sizes.append(config.router_width)
    if width % (2 * lanes) or width > cpu.WIDEST_HEAD or any(size % lanes for size in sizes):
        return None
    scaling, eps = layers[0].self_attn.scaling, model.norm.variance_epsilon
    decoder = cpu.decoder(config.num_attention_heads, groups, width, scaling, eps, model.norm.weight)
    for part in parts:
        decoder.add(*part)
    return _Stack(model, decoder)


class Parts(NamedTuple):
    """What a decoded token needs of a layer.

    Attributes:
        norms: Weights of the norms before attention and MLP.
        head_norms: Of those of queries and keys, or none.
        weights: Operands of the linears' products, in the order of `cpu/stack.h`.
        biases: Of the linears.
        router: Its operands, or none.
    """

    norms: list[Tensor]
    head_norms: list[Tensor]
    weights: list[tuple[Tensor, ...]]
    biases: list[Tensor | None]
    router: list[Tensor]


def parts_of(model: Any, dtype: torch.dtype) -> list[Parts] | None:
    """The layers' parts, for tokens of a dtype; None where one isn't of `fused`.

    None, too, where what a token skips isn't left out, or is a part of a layer.
    """
    config, layers = model.config, model.layers
    if not isinstance(model.norm, FusedRMSNorm) or model.norm.weight.dtype != dtype:
        return None
    if config.gates != "layer" or config.keep_kv or config.stand_in_rank or config.hidden_act != "silu":
        return None
    found = [_parts(layer, dtype) if isinstance(layer, FusedLayer) else None for layer in layers]
    return None if any(parts is None for parts in found) else [parts for parts in found if parts is not None]


def _parts(layer: FusedLayer, dtype: torch.dtype) -> Parts | None:
    """A layer's; None where something about it isn't known."""
    attention: Any = layer.self_attn
    norms: list[Any] = [layer.input_layernorm, layer.post_attention_layernorm]
    head_norms: list[Any] = [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []
    linears: list[Any] = [
        layer.get_submodule(f"{block}.{name}") for block, names in _LINEARS.items() for name in names
    ]
    known = isinstance(attention, FusedAttention) and isinstance(layer.mlp, FusedMLP)
    if not known or not all(isinstance(norm, FusedRMSNorm) for norm in norms + head_norms):
        return None
    weights = [linear.operands(dtype) if hasattr(linear, "operands") else None for linear in linears]
    biases = [linear.bias if hasattr(linear, "bias") else None for linear in linears]
    others = [norm.weight for norm in norms + head_norms] + [bias for bias in biases if bias is not None]
    complete = [operands for operands in weights if operands is not None]
    if len(complete) < len(weights) or any(other.dtype != dtype for other in others):
        return None
    router = [] if layer.router is None else layer.router.operands(dtype)
    return Parts(
        [norm.weight for norm in norms], [norm.weight for norm in head_norms], complete, biases, router
    )
