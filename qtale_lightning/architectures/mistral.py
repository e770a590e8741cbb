"""Mistral: LLaMA's layer, whose attention may reach back a window of tokens only."""

from qtale_lightning.architectures.base import Architecture, KnownModel, sizes

MISTRAL = Architecture(
    model_type="mistral",
    causal_lm="MistralForCausalLM",
    models={
        "mistral-7b": KnownModel(
            sizes(32000, 4096, 14336, 32, 32, 8, sliding_window=4096),
            hub="mistralai/Mistral-7B-v0.1",
            revision="27d67f1b5f57dc0953326b2601d68371d40ea8da",
        ),
    },
)
