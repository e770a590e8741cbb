"""Static layer drop: the layers that change the residual stream least are left out, and LoRA heals what is left.

Layers are ranked by ShortGPT's Block Influence (Men et al. 2024), BI_l = 1 − E_t cos(x_l,t, x_l+1,t) of what layer l
reads and gives, over the tokens of training rows in the dense base model, and healed as Shortened LLaMA does (Kim et
al. 2024). All tokens do without the same layers: what routing is worth is what it has over this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtale_lightning.routing.method import Method, Rows

if TYPE_CHECKING:
    from torch import Tensor


class Static(Method):
    """The model is made without the dropped layers, so that they cost neither time nor memory nor bytes on the disk.

    Those that are left are numbered anew, from 0; ``dropped_layers`` of the configuration are the base model's numbers,
    and the execution ratio is a share of the base model's layers: a dropped one counts as never executed.
    """

    name = "static"
    title = "static"
    measures = True

    def fields(self, layers: int, start_layer: int, target_ratio: float, seed: int) -> dict[str, Any]:
        """As many layers as come nearest to the target ratio, at least one; which ones is measured, here the first."""
        kept = max(1, round(target_ratio * layers))
        return {"num_hidden_layers": kept, "start_layer": kept, "dropped_layers": [*range(kept, layers)]}

    def measure(self, base: Any, rows: Rows, fields: dict[str, Any]) -> dict[str, Any]:
        """The layers of least influence."""
        ranked = block_influence(base, rows).argsort(stable=True).tolist()
        return {"dropped_layers": sorted(ranked[: len(fields["dropped_layers"])])}

    def change(self, base: Any, fields: dict[str, Any]) -> None:
        """Take the dropped layers out."""
        dropped, config = set(fields["dropped_layers"]), base.config
        kept = [index for index in range(config.num_hidden_layers) if index not in dropped]
        layers = base.model.layers
        base.model.layers = type(layers)([layers[index] for index in kept])
        for number, layer in enumerate(base.model.layers):
            layer.self_attn.layer_idx = number
        config.num_hidden_layers = len(kept)
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[index] for index in kept]

    def describe(self, config: Any) -> str:
        """Which layers are missing."""
        numbers = ", ".join(map(str, config.dropped_layers)) or "none"
        return f"Layers of the base model that it was made without: {numbers}; the others are numbered anew."


def block_influence(base: Any, rows: Rows) -> Tensor:
    """BI of each layer of a dense model, ``(layers,)`` in float64, over all tokens of the rows."""
    import torch
    from torch.nn.functional import cosine_similarity

    layers = base.model.layers
    changes = torch.zeros(len(layers), dtype=torch.float64)
    tokens = sum(map(len, rows.sequences))

    def watch(index: int) -> Any:
        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            similarity = cosine_similarity(before.float(), after.float(), dim=-1)
            changes[index] += (1 - similarity).sum().double().cpu()

        return hook

    handles = [
        layer.register_forward_hook(watch(index), with_kwargs=True) for index, layer in enumerate(layers)
    ]
    was_training = base.training
    base.eval()
    try:
        with torch.no_grad():
            for sequence in rows.sequences:
                base.model(torch.tensor([sequence], device=base.device), use_cache=False)
    finally:
        base.train(was_training)
        for handle in handles:
            handle.remove()
    return changes / max(1, tokens)


METHOD = Static()
