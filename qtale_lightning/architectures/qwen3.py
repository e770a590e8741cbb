"""Qwen3: LLaMA's layer with norms over each head of q and k, whose width is the configuration's own."""

from qtale_lightning.architectures.base import Architecture, KnownModel, sizes

QWEN3 = Architecture(
    model_type="qwen3",
    causal_lm="Qwen3ForCausalLM",
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    biases={f"self_attn.{name}": "attention_bias" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    models={
        "qwen3-0.6b": KnownModel(
            sizes(151936, 1024, 3072, 28, 16, 8, head_dim=128, tie_word_embeddings=True),
            hub="Qwen/Qwen3-0.6B",
            revision="c1899de289a04d12100db370d81485cdf75e47ca",
        ),
    },
)
