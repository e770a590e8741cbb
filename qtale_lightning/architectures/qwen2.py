"""Qwen2 and Qwen2.5: LLaMA's layer with biases on q, k and v."""

from qtale_lightning.architectures.base import Architecture, KnownModel, sizes

QWEN2 = Architecture(
    model_type="qwen2",
    causal_lm="Qwen2ForCausalLM",
    biases={f"self_attn.{name}": True for name in ("q_proj", "k_proj", "v_proj")},
    models={
        "qwen2.5-0.5b": KnownModel(
            sizes(151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True),
            hub="Qwen/Qwen2.5-0.5B",
            revision="060db6499f32faf8b98477b0a26969ef7d8b9987",
        ),
    },
)
