"""What a quantized model is judged by: questions that weren't calibrated on, and the model before."""

import hashlib
import json
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.evaluation.accuracy import accuracy_by_task, mean_error, mean_over_tasks
from qtale_lightning.evaluation.scoring import score
from qtale_lightning.models import RoutedForCausalLM, route, routed_config
from qtale_lightning.models.sources import load_base, load_tokenizer
from qtale_lightning.quantization.calibration import Batch, padded_batches
from quantizers.cost import Cost, layer_bytes

HELD_OUT = 64  # validation prompts, with their gold answers, whose logits are compared


class Judge:
    """The model, its calibration sets and its questions.

    Attributes:
        model: In full precision.
        sequences: Of each calibration set.
        sets: The same in batches.
    """

    def __init__(self, args: Namespace) -> None:
        """Loads the model and the rows."""
        self._args = args
        data = CommonsenseDataModule(
            tasks=args.tasks,
            root=args.data and str(args.data),
            mix="uniform",
            limit_validation=args.questions,
        )
        data.tokenizer = load_tokenizer(args.model)
        data.setup("fit")
        drawn = data.calibration_sequences(args.sequences * args.sets)
        self.sequences = [drawn[i : i + args.sequences] for i in range(0, len(drawn), args.sequences)]
        self.sets: list[Sequence[Batch]] = [padded_batches(one) for one in self.sequences]
        self.questions = data.questions("validation")
        self._metrics = data.protocol()["metrics"]
        chosen = self.questions[:: max(1, len(self.questions) // HELD_OUT)]
        answered = [q.contexts[q.label] + q.continuations[q.label] for q in chosen]
        self._held_out = padded_batches(answered)
        self.rows = hashlib.sha256(json.dumps([self.sequences[0], answered]).encode()).hexdigest()[:16]
        self.model = self.load()
        self._exact, self._limit = self._logits(self.model), layer_bytes(self.model)

    def load(self) -> RoutedForCausalLM:
        """The model, to be quantized."""
        base = load_base(self._args.model, dtype=getattr(torch, self._args.dtype))
        without_routers = {"start_layer": base.config.num_hidden_layers}
        return route(base, routed_config(base.config, **without_routers)).eval()

    @torch.inference_mode()
    def _logits(self, model: RoutedForCausalLM) -> Tensor:
        return torch.cat(
            [model(**batch).logits[batch["attention_mask"].bool()].float() for batch in self._held_out]
        )

    def row(
        self, model: RoutedForCausalLM, bits: float, engine: str, number: int, cost: Cost
    ) -> dict[str, Any]:
        """What is measured of a model."""
        found = self._logits(model)
        delta = found - self._exact
        kl = torch.nn.functional.kl_div(
            found.log_softmax(-1), self._exact.log_softmax(-1), log_target=True, reduction="batchmean"
        )
        likelihoods = score(model, self.questions).loglikelihoods
        accuracy = accuracy_by_task(self.questions, likelihoods, self._metrics)
        return {
            "bits": int(bits) if bits == int(bits) else bits, "engine": engine, "set": number,
            "threads": torch.get_num_threads(), "search s": cost.seconds, "search CPU s": cost.processor,
            "extra MB": cost.grown / 1e6, "a layer MB": self._limit / 1e6,
            "logits MSE": delta.square().mean().item(),
            "centred MSE": delta.sub_(delta.mean(-1, keepdim=True)).square_().mean().item(), "KL": kl.item(),
            "answer nll": mean_over_tasks(accuracy, "nll"), "± nll": mean_error(accuracy, "nll_stderr"),
            "accuracy %": 100 * mean_over_tasks(accuracy, "value"), "± %": 100 * mean_error(accuracy, "stderr"),
        }  # fmt: skip

    def tokens(self) -> list[int]:
        """Of each calibration set."""
        return [int(sum(batch["attention_mask"].sum() for batch in one)) for one in self.sets]
