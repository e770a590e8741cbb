"""lm-evaluation-harness, unmodified, on this suite's models and rows."""

from qtale_lightning.harness.backend import (
    HarnessUnavailableError,
    evaluate_tasks,
    find_tasks,
    harness_model,
    harness_version,
    table,
)
from qtale_lightning.harness.run import Evaluation, lm_eval, load_evaluations, save_evaluation
from qtale_lightning.harness.tasks import LOCAL, is_local, local_prompts, write_tasks

__all__ = [
    "LOCAL",
    "Evaluation",
    "HarnessUnavailableError",
    "evaluate_tasks",
    "find_tasks",
    "harness_model",
    "harness_version",
    "is_local",
    "lm_eval",
    "load_evaluations",
    "local_prompts",
    "save_evaluation",
    "table",
    "write_tasks",
]
