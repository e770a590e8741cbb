"""Questions: tasks and their rows, prompts, token ids, and the Lightning data module."""

from typing import TYPE_CHECKING

from qtale_lightning.data.facts import facts_corpus, generate_facts
from qtale_lightning.data.parsing import Question
from qtale_lightning.data.prompts import CHOICE_LABELS, PROMPT_STYLES, Prompt, build_prompt
from qtale_lightning.data.readers import read_hub, read_local
from qtale_lightning.data.tasks import SUITES, TASKS, Task, resolve_tasks
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
    "SUITES",
    "TASKS",
    "CommonsenseDataModule",
    "EncodedPrompt",
    "LengthBatchSampler",
    "Prompt",
    "Question",
    "Task",
    "TrainingExample",
    "build_prompt",
    "collate",
    "encode_pair",
    "encode_prompt",
    "facts_corpus",
    "generate_facts",
    "read_hub",
    "read_local",
    "resolve_tasks",
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
