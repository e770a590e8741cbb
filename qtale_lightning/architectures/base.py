"""What the suite needs to know of a model family; each is declared in a file of its own beside this one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class ScaleMapping(NamedTuple):
    """Linears that read one input, and the operation before them that AWQ folds their scales into.

    All are names within a decoder layer.
    """

    previous: str
    linears: tuple[str, ...]

    @property
    def inspected(self) -> str:
        """The module whose output AWQ compares: a linear alone, or the block around several."""
        return self.linears[0] if len(self.linears) == 1 else self.block

    @property
    def block(self) -> str:
        """The block, attention or MLP, that the linears are part of."""
        return self.linears[0].rpartition(".")[0]


@dataclass(frozen=True)
class KnownModel:
    """A model that the suite knows by name.

    Attributes:
        config: Arguments of its family's configuration, so that costs can be planned without the weights.
        hub: Its Hugging Face id; None for a model that is made on the spot.
        revision: The commit of it that is read.
        package: (package, file): an installed Python package that carries the weights as GGUF. It comes before the hub.
        parts: Packages that carry that file's parts, in order, where it is too large for one; it is joined once.
        sha256: Of the joined file.
    """

    config: Mapping[str, Any]
    hub: str | None = None
    revision: str | None = None
    package: tuple[str, str] | None = None
    parts: tuple[str, ...] = ()
    sha256: str = ""


@dataclass(frozen=True)
class Architecture:
    """A model family: Hugging Face's decoder-only model, whose layers hold an attention and a gated MLP.

    Attributes:
        model_type: Hugging Face's name of it, as config.json has it.
        causal_lm: Name of transformers' class with a language-model head.
        models: Those that the suite knows by name.
        mappings: What AWQ scales together, and into which operation the scales are folded.
        not_clipped: Linears that AWQ doesn't clip: the product of q and k forms the scores, and their errors don't
            add up.
        norms: A layer's norms over the residual stream's width.
        norms_behind: The norm that a block's output goes through before it joins the residual stream, by block.
        head_norms: A layer's norms over a head's width.
        biases: Linears with a bias, each with the configuration's field that says so, or True.
        norm_offset: What norms add to their stored weight: 1 in a family that stores its difference from 1.
        fused: Whether attention and MLP are LLaMA's but for what is declared here, so that `models.fused` computes
            them; its norms, too, where `norm_offset` is 0.
    """

    model_type: str
    causal_lm: str
    models: Mapping[str, KnownModel] = field(default_factory=dict)
    mappings: tuple[ScaleMapping, ...] = (
        ScaleMapping("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ScaleMapping("self_attn.v_proj", ("self_attn.o_proj",)),
        ScaleMapping("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ScaleMapping("mlp.up_proj", ("mlp.down_proj",)),
    )
    not_clipped: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj")
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norms_behind: Mapping[str, str] = field(default_factory=dict)
    head_norms: tuple[str, ...] = ()
    biases: Mapping[str, str | bool] = field(default_factory=dict)
    norm_offset: float = 0.0
    fused: bool = True

    @property
    def linears(self) -> tuple[str, ...]:
        """Names within a layer of what is quantized."""
        return tuple(linear for mapping in self.mappings for linear in mapping.linears)

    def mapping(self, linear: str) -> ScaleMapping:
        """The one that scales a linear's input."""
        return next(mapping for mapping in self.mappings if linear in mapping.linears)

    def norm_of(self, mapping: ScaleMapping) -> str:
        """The norm in front of a mapping's block, which reads the residual stream that the block is added to."""
        return next(
            m.previous for m in self.mappings if m.block == mapping.block and m.previous in self.norms
        )

    @property
    def norm_before_mlp(self) -> str:
        """The one that the MLP reads the residual stream through."""
        return next(self.norm_of(mapping) for mapping in self.mappings if mapping.block == "mlp")

    def shapes(self, config: Any) -> dict[str, tuple[int, int]]:
        """Weight shapes `(out, in)` of a layer's linears by name, from the fields of Hugging Face's configurations."""
        hidden, inner, head = config.hidden_size, config.intermediate_size, head_width(config)
        queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
        widths = {
            "q_proj": (queries, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "o_proj": (hidden, queries),
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }
        return {name: widths[name.rpartition(".")[2]] for name in self.linears}

    def sublayers(self, config: Any) -> dict[str, int]:
        """Weights of the linears in each of a layer's sublayers, attention and MLP, by name and in that order."""
        weights: dict[str, int] = {}
        for name, (outputs, inputs) in self.shapes(config).items():
            block = name.partition(".")[0]
            weights[block] = weights.get(block, 0) + outputs * inputs
        return weights

    def biased(self, config: Any) -> list[str]:
        """The linears that have a bias."""
        return [
            name
            for name, said in self.biases.items()
            if said is True or (isinstance(said, str) and getattr(config, said, False))
        ]


def head_width(config: Any) -> int:
    """Width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def window(config: Any, layer: int) -> int | None:
    """Tokens that a layer attends to at most, the last ones; None: all. As Hugging Face's configurations say it."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def sizes(
    vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    """Sizes of a model in the names of Hugging Face's configurations."""
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }
