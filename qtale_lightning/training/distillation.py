"""Self-distillation: what the full depth of the model says of the answer is what its routed depth learns, too.

After ElastiFormer (arXiv 2411.15281): KL to the logits of the full-depth model, beside the cross-entropy of the labels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import qtale_lightning.models.families  # noqa: F401  # registers routed models with transformers
from qtale_lightning.losses import sequence_mean
from qtale_lightning.models.modeling import RoutedForCausalLM
from qtale_lightning.models.routing import Routing


def distillation_loss(student: Tensor, teacher: Tensor, answer: Tensor) -> Tensor:
    """KL(teacher ‖ student) in nats, a scalar: the mean over a sequence's answer tokens, then over sequences.

    Args:
        student: Logits of the positions that predict an answer token, in the batch's order, ``(M, V)``.
        teacher: The same of the teacher.
        answer: Which positions those are, bool ``(B, T)`` with M true.
    """
    log_p, log_q = (logits.float().log_softmax(-1) for logits in (teacher, student))
    kl = nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    values = torch.zeros(answer.shape, dtype=kl.dtype, device=kl.device).masked_scatter(answer, kl)
    return sequence_mean(values, answer)


class Teacher:
    """The model at full depth (θ = 0), without dropout or gradient.

    Args:
        student: Gives the model that is trained, whose weights of this step teach where there is no folder.
        folder: Of an exported model, such as that of a finished run of the method full.
        dtype: Of its weights.
    """

    def __init__(
        self, student: Callable[[], RoutedForCausalLM], folder: Path | None, dtype: torch.dtype
    ) -> None:
        self._student = student
        self._other: Any = (
            None  # no part of the module that is trained: of no checkpoint, on no list of parameters
        )
        if folder is not None:
            self._other = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    @torch.no_grad()
    def logits(self, batch: dict[str, Tensor], places: Tensor) -> Tensor:
        """Logits ``(M, V)`` at flat places ``(M,)`` of ``input_ids (B, T)``."""
        model = self._student() if self._other is None else self._other.to(batch["input_ids"].device)
        with _evaluating(model):
            hidden = model.model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                routing=Routing(threshold=0.0, sample=False, execution="packed"),
                use_cache=False,
            ).last_hidden_state
            return model.lm_head(hidden.flatten(0, 1).index_select(0, places))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode meanwhile."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
