"""Questions: rows of tasks, prompts, token ids, and the Lightning data module."""

from typing import TYPE_CHECKING

from qtale_lightning.data.prompts import CHOICE_LABELS, PROMPT_STYLES, Prompt, build_prompt
from qtale_lightning.data.readers import read_hub, read_local
from qtale_lightning.lazy import lazily

if TYPE_CHECKING:
    from qtale_lightning.data.datamodule import CommonsenseDataModule
    from qtale_lightning.data.sampler import LengthBatchSampler
    from qtale_lightning.data.tokenization import (
        EncodedPrompt,
        TrainingExample,
        collate,
        encode_pair,
        encode_prompt,
        training_example,
    )

__all__ = [
    "CHOICE_LABELS",
    "PROMPT_STYLES",
    "CommonsenseDataModule",
    "EncodedPrompt",
    "LengthBatchSampler",
    "Prompt",
    "TrainingExample",
    "build_prompt",
    "collate",
    "encode_pair",
    "encode_prompt",
    "read_hub",
    "read_local",
    "training_example",
]

__getattr__ = lazily(
    __name__,
    {
        f"{__name__}.datamodule": ["CommonsenseDataModule"],
        f"{__name__}.sampler": ["LengthBatchSampler"],
        f"{__name__}.tokenization": [
            "EncodedPrompt",
            "TrainingExample",
            "collate",
            "encode_pair",
            "encode_prompt",
            "training_example",
        ],
    },
)
