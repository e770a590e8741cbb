"""The small LLaMA that the tests of evaluation ask."""

from typing import Any

ARCHITECTURE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,  # large enough for logits and decisions that differ between tokens
}
