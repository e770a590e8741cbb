"""What one forward pass decides: the rule by which layers are executed, and the record of what was decided."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from qtale_lightning.models.packing import Packing, Reach, Subset, branch_mask
from qtale_lightning.routing import METHODS, Method
from qtale_lightning.routing.perturbation import Perturber
from qtale_lightning.routing.router import Router

Execution = Literal["masked", "packed"]


_NOTHING = torch.empty(0)


class OfUnits(Mapping[int, Tensor]):
    """Tensors by unit, rows of one with all of them, ``(units, …)``: made where they are asked for."""

    def __init__(self, units: Sequence[int], rows: Tensor) -> None:
        self.units, self.rows = list(units), rows

    def __getitem__(self, unit: int) -> Tensor:
        try:
            return self.rows[self.units.index(unit)]
        except ValueError:
            raise KeyError(unit) from None

    def __iter__(self) -> Iterator[int]:
        return iter(self.units)

    def __len__(self) -> int:
        return len(self.units)


@dataclass
class Routing:
    """The decisions of one forward pass: made for a call, filled in by it, and read after it.

    Pass one to read decisions or to change how they are made: ``model(..., routing=Routing(threshold=0.3))``.

    Attributes:
        threshold: Execute iff p(execute) ≥ threshold; 0 is exactly the base model. One for all layers, or one a routed
            unit, in order. None: the model's configured one.
        execution: ``masked`` computes every token and mixes; ``packed`` computes executing tokens only (needs no
            gradient). None: masked while training, packed otherwise.
        sample: Decide as the method does in training. None: while training.
        temperature: Of the Gumbel-softmax.
        noise: What Gumbel's draws are multiplied by where decisions are sampled.
        rate: Share of a layer's free tokens that execute it, of methods that fix it. None: the model's configured one.
        forced: Decisions to use instead of the routers', unit → bool ``(B, T)``.
        branch: Several continuations of one text in one sequence, and of these again, int ``(B, T, levels)``: a token
            sees those before it whose number is 0 or its own at every level. Give their ``position_ids`` to the model,
            and no cache.
        align: Let packed execution repeat a token, where that makes the shapes of products faster; see
            :class:`Packing`. Not where something counts the tokens that reach a linear.
        asked: Tokens whose last hidden states the caller will read, bool ``(B, T)``: in packed execution the last layer
            computes no others (but all decisions, and all keys and values), and leaves them as they entered it. None:
            all.
        keep: Layers whose inputs this pass leaves in ``states``, for later ones to resume from.
        resume: First layer to compute: those before decide and give what they did in this object's last pass, over the
            same inputs, and aren't computed again. Packed execution only. 0: compute all.
        tokens: Real (not padding) tokens of this call, bool ``(B, T)``. Set by the model.
        ids: The tokens, int64 ``(B, T)``; None where the model is given embeddings. Set by the model.
        free: Tokens that routers decide about: real and behind the reserved initial ones, bool ``(B, T)``. Set by
            the model.
        places: Of real tokens in their sequences, from 0, int64 ``(B, T)``. Set by the model.
        length: Of the longest sequence so far, with what a cache holds and padding. Set by the model.
        shares: Of a layer's units, what routers decide about, as `architectures.unit_shares` gives them: one unit is
            the layer, and has its number; of two, attention and MLP, those of layer i are 2i and 2i + 1. Set by the
            model.
        logits: Unit → router logits ``(B, T, 2)`` in float32. Filled by the forward pass.
        gates: Unit → decisions ``(B, T)``, 1 = executed; padding is 0, reserved tokens are 1. Filled by it too.
        method: How decisions are made. Set by the model.
        seed: Of decisions by chance at inference. Set by the model.
        keep_kv: Whether tokens leave keys and values in layers that they skip, too. Set by the model.
        thresholds: Routed unit, one that is decided about, → its θ. Set by the model.
        perturber: Changes the routers' logits, for what decisions depend on; None: nothing does. Set by the model.
        states: Layer in ``keep`` → its input ``(B, T, D)``. Filled by the forward pass.
    """

    threshold: float | Sequence[float] | None = None
    execution: Execution | None = None
    sample: bool | None = None
    temperature: float = 1.0
    noise: float = 1.0
    rate: float | None = None
    forced: Mapping[int, Tensor] | None = None
    branch: Tensor | None = None
    align: bool = True
    asked: Tensor | None = None
    keep: Collection[int] = ()
    resume: int = 0
    tokens: Tensor = _NOTHING
    free: Tensor = _NOTHING
    ids: Tensor | None = None
    places: Tensor = _NOTHING
    length: int = 0
    shares: Sequence[float] = (1.0,)
    logits: dict[int, Tensor] | OfUnits = field(default_factory=dict)
    gates: dict[int, Tensor] | OfUnits = field(default_factory=dict)
    method: Method = METHODS["qtale"]
    seed: int = 0
    keep_kv: bool = False
    thresholds: Mapping[int, float] = field(default_factory=dict)
    perturber: Perturber | None = None
    states: dict[int, Tensor] = field(default_factory=dict)
    _attention_bias: dict[int | None, Tensor] = field(default_factory=dict)
    _packing: Packing | None = None
    _visible: Tensor | None = None

    def start(self) -> None:
        """Forget what belongs to one pass, but what it resumes from: generate() hands the same object to every step."""
        kept = range(self.resume * len(self.shares))
        self.logits = {unit: logits for unit, logits in self.logits.items() if unit in kept} if kept else {}
        self.gates = {unit: gate for unit, gate in self.gates.items() if unit in kept} if kept else {}
        self.states = {layer: state for layer, state in self.states.items() if layer <= self.resume}
        self._packing = self._visible = None
        self._attention_bias = {}

    def decide(self, unit: int, router: Router | None, hidden_states: Tensor) -> Tensor:
        """Which tokens execute a unit: ``(B, T)``, float with gradient when sampled, else bool; recorded."""
        if unit not in self.thresholds:
            return self.tokens
        assert isinstance(self.logits, dict)
        assert isinstance(self.gates, dict)
        if router is not None:
            logits = router(hidden_states)
            self.logits[unit] = logits if self.perturber is None else self.perturber(logits, self, unit)
        if self.forced is not None and unit in self.forced:
            decided = self.forced[unit]
        else:
            decided = (self.method.sample if self.sample else self.method.decide)(self, unit)
        gate = torch.where(self.free, decided, self.tokens.to(decided.dtype))
        self.gates[unit] = gate
        return gate

    def packing(self, gate: Tensor) -> Packing:
        """Where the executing tokens of a unit go; the same for all units that all tokens execute."""
        if gate is not self.tokens:
            return Packing.of(gate, self.align)
        if self._packing is None:
            self._packing = Packing.of(gate, self.align)
        return self._packing

    def subset(self, present: Tensor, packing: Packing, asked: Tensor | None) -> Subset | None:
        """Those of the tokens that are present in a layer whose output is asked for; None: all."""
        return None if asked is None else Subset.of(present, packing, asked, self.align)

    def visible(self, packing: Packing, queries: Subset | None) -> Tensor | None:
        """Which executing tokens those that are asked for may see, bool ``(B, 1, L', L)``; None without branches.

        Causal where all are asked for. The same for all layers that all tokens execute.
        """
        if self.branch is None:
            return None
        if (everyone := queries is None and packing is self._packing) and self._visible is not None:
            return self._visible
        keys = packing.to_rows(packing.gather(self.branch))
        if queries is None:
            mask = branch_mask(keys, keys).tril()
        else:
            mask = branch_mask(queries.packing.to_rows(queries.packing.gather(self.branch)), keys)
        if everyone:
            self._visible = mask.unsqueeze(1)
        return mask.unsqueeze(1)

    def reach(self, window: int | None) -> Reach | None:
        """How far back tokens may see in a layer with a window; None: to the beginning."""
        return None if window is None else Reach(window, self.places, self.length > window)

    def attention_bias(self, dtype: torch.dtype, window: int | None = None) -> Tensor:
        """Causal and padding mask of masked execution, additive, ``(B, 1, T, T)``; the same for layers of a window."""
        if window not in self._attention_bias:
            length = self.tokens.shape[1]
            causal = torch.ones(length, length, dtype=torch.bool, device=self.tokens.device).tril()
            allowed = causal & self.tokens[:, None, None, :]
            if self.branch is not None:
                allowed = allowed & branch_mask(self.branch, self.branch).unsqueeze(1)
            if window is not None and self.length > window:
                back = self.places[:, :, None] - self.places[:, None, :]
                allowed = allowed & (back < window).unsqueeze(1)
            # Finite, as in Hugging Face: a padding query that may see nothing must not become NaN.
            self._attention_bias[window] = torch.zeros(
                allowed.shape, dtype=dtype, device=allowed.device
            ).masked_fill_(~allowed, torch.finfo(dtype).min)
        return self._attention_bias[window]

    def stacked_logits(self) -> Tensor:
        """Logits of all routed units, in order, ``(R, B, T, 2)``."""
        return torch.stack([self.logits[unit] for unit in sorted(self.logits)])

    def stacked_gates(self) -> Tensor:
        """Decisions of all routed units, in order, ``(R, B, T)`` in float32."""
        return torch.stack([self.gates[unit].float() for unit in sorted(self.gates)])

    def stacked_shares(self) -> Tensor:
        """How much of each routed layer tokens execute, by weights, in order, ``(routed layers, B, T)`` in float32."""
        return by_layer(self.stacked_gates(), self.shares)

    def executed(self, units: int) -> Tensor:
        """Number of real tokens that executed each of the model's units, ``(units,)`` int64."""
        everyone = self.tokens.sum()
        return torch.stack(
            [(self.gates[i].detach() != 0).sum() if i in self.gates else everyone for i in range(units)]
        )


def by_layer(of_units: Tensor, shares: Sequence[float]) -> Tensor:
    """Of values of units ``(layers · n, …)``, those of layers ``(layers, …)``: means by the units' n shares.

    Where units have the same value, it is exactly their layer's.
    """
    *others, last = (of_units[unit :: len(shares)] for unit in range(len(shares)))
    return sum((share * (other - last) for share, other in zip(shares, others, strict=False)), last)
