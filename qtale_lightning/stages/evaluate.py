"""Evaluation of a run's models at each precision and θ: rows of results.json, and the answer to each question."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from qtale_lightning.bits_schedule import Schedule
from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.data.tokenization import EncodedPrompt
from qtale_lightning.digests import of_model
from qtale_lightning.evaluation import cost, statistics
from qtale_lightning.evaluation.accuracy import accuracy_by_task, average
from qtale_lightning.evaluation.scoring import Scores, score_thresholds
from qtale_lightning.models.modeling import RoutedForCausalLM
from qtale_lightning.quantization.lighter import lightened
from qtale_lightning.report.notes import theta_text
from qtale_lightning.report.scores import score_header, score_text
from qtale_lightning.results import predictions
from qtale_lightning.results.fingerprints import Fingerprint, fingerprint, made
from qtale_lightning.results.schema import Evaluation
from qtale_lightning.results.series import perturbation_of
from qtale_lightning.results.store import load_or_new, same_theta, upsert_evaluation
from qtale_lightning.routing.perturbation import in_words, perturbed
from qtale_lightning.run import RunDirectory
from qtale_lightning.stages.progress import console, progress
from qtale_lightning.stages.writing import save_answers, write_answers, writing_protocol

Split = Literal["calibration", "validation"]
Theta = float | list[float] | None


@dataclass(frozen=True)
class Subject:
    """A run's model at one precision, and the data that it is asked from.

    Attributes:
        engine: That quantized it; "none" at 16 bits.
    """

    run: RunDirectory
    data: CommonsenseDataModule
    model: RoutedForCausalLM
    bits: float
    engine: str

    def __str__(self) -> str:
        return f"{self.bits:g} bits"

    @property
    def row_engine(self) -> str:
        """The engine, in how many bits tokens (a) and head (h) are computed where that isn't 16, "rtn+a8+h4", and by
        which schedule answers are written, "nested+0:4,32:3"."""
        lighter = sorted(f"{name[0]}{bits}" for name, bits in lightened(self.model).items())
        return "+".join([self.engine, *lighter, *([self.schedule] if self.schedule else [])])

    @property
    def schedule(self) -> str:
        """By which precision falls while answers are written; empty: it doesn't."""
        schedule = getattr(self.model.generation_config, "bits_schedule", None)
        return "" if schedule is None else str(Schedule.read(schedule))

    def protocol(self, split: Split) -> dict[str, Any]:
        """What the scores depend on besides the model."""
        protocol = self.data.protocol() | {"scoring": "log-likelihood", "execution": "packed"}
        protocol |= lightened(self.model)
        if record := perturbed(self.model):
            protocol["perturbation"] = record
        written = writing_protocol(self.data) if split == "validation" else {}
        return protocol | {"metrics": self.data.asking.metrics(split)} | written

    @cached_property
    def _model_digest(self) -> str:
        return of_model(self.run.model(self.bits, self.engine))

    @cached_property
    def _made(self) -> dict[str, Any] | None:
        return made(self.run.quantization_config(self.bits, self.engine))

    def fingerprint(self, split: Split) -> Fingerprint:
        """What makes its rows, θ apart."""
        return fingerprint(self._model_digest, self._made, self.data.digest(split), self.protocol(split))

    def known(self, theta: Theta, split: Split) -> Evaluation | None:
        """The row of an earlier evaluation of the same model on the same questions by the same protocol."""
        key = (self.bits, self.row_engine, split, self.fingerprint(split))
        for row in load_or_new(self.run.root)["evaluation"]:
            found = (row["bits"], row["engine"], row["split"], row.get("fingerprint"))
            if found == key and same_theta(row["theta"], theta):
                return row
        return None

    def evaluate(self, thetas: Sequence[Theta], split: Split, pairs: bool = False) -> list[Evaluation]:
        """Score a split at every θ, those that are missing in one go, and keep the rows.

        Args:
            thetas: [None] for a model without θ.
            split: Whose questions.
            pairs: What was answered to each question is needed, too: rows without it are scored again.
        """
        missing: list[Theta] = []
        for theta in thetas:
            row = self.known(theta, split)
            if row is None or (pairs and predictions.load_predictions(self.run.root, row) is None):
                missing += [theta] if theta not in missing else []
        if missing:
            questions = self.data.questions(split)
            names = f", θ = {', '.join(map(theta_text, missing))}" if missing != [None] else ""
            with progress(f"{self}{names}, {split}", len(questions)) as advance:
                found = score_thresholds(self.model, questions, missing, on_progress=advance)
            for theta, scores in zip(missing, found, strict=True):
                self.keep(theta, split, scores)
        rows = [self.known(theta, split) for theta in thetas]
        return [row for row in rows if row is not None]

    def keep(self, theta: Theta, split: Split, scores: Scores) -> Evaluation:
        """Write a row of scores into ``results.json``, after what was answered to each question."""
        questions, protocol = self.data.questions(split), self.protocol(split)
        theta_said = "" if theta is None else f", θ = {theta_text(theta)}"
        started, texts, tokens = time.perf_counter(), dict[int, str](), list[int]()
        if split == "validation":
            what = f"{self}{theta_said}"
            texts = write_answers(self.data, self.model, theta, what, on_tokens=tokens.append)
        writing_seconds = time.perf_counter() - started
        accuracy = accuracy_by_task(questions, scores.loglikelihoods, protocol["metrics"], texts)
        outcomes = predictions.predictions(questions, scores.loglikelihoods, protocol["metrics"], texts)
        row: Evaluation = {
            "bits": self.bits,
            "engine": self.row_engine,
            "theta": theta,
            "split": split,
            "examples": len(questions),
            "execution_ratio": sum(scores.execution) / len(scores.execution),
            "execution_ratio_per_layer": scores.execution,
            "flops_ratio": cost.flops_ratio(self.model.config, scores.units, _mean_context(questions)),
            "accuracy": accuracy,
            **average(accuracy),  # type: ignore[typeddict-item]
            "weight_bytes": self.run.weight_bytes(self.bits, self.engine),
            "seconds": scores.seconds,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "protocol": protocol,
            "fingerprint": self.fingerprint(split),
        }
        if scores.sublayers is not None:
            row["execution_ratio_per_sublayer"] = scores.sublayers
        if row["average"] is not None:  # then both averages are means over questions, within tasks
            row["average_stderr"] = statistics.average(predictions.by_task(outcomes, "value")).stderr
            row["average_nll_stderr"] = statistics.average(predictions.by_task(outcomes, "nll")).stderr
        if texts:
            row["writing_seconds"], row["writing_tokens"] = writing_seconds, sum(tokens)
            save_answers(self.run.root, row, questions, texts, self.data)
        predictions.save_predictions(self.run.root, row, outcomes)
        upsert_evaluation(self.run.root, row)
        if split == "validation":
            self.say(row, f"{scores.seconds:.0f} s")
        return row

    def say(self, row: Evaluation, how: str) -> None:
        """A row in a line, with what there is to say of its measurement."""
        theta = "" if row["theta"] is None else f", θ = {theta_text(row['theta'])}"
        engine = "" if self.row_engine == "none" else f", {self.row_engine}"
        engine += f", {said}" if (said := in_words(perturbation_of(row))) else ""
        console.print(
            f"{self.bits:>3g} bits{engine}{theta}: {_accuracy_said(row)}nll {row['average_nll']:.3f}, "
            f"execution ratio {row['execution_ratio']:.3f}, {how}"
        )


def evaluate(
    run: RunDirectory,
    data: CommonsenseDataModule,
    model: RoutedForCausalLM,
    bits: float,
    engine: str,
    theta: Theta,
    split: Split,
) -> Evaluation:
    """Score a split at one precision and θ, and keep the row in ``results.json``; a row already there is returned."""
    subject = Subject(run, data, model, bits, "none" if bits == 16 else engine)
    if (row := subject.known(theta, split)) is not None:
        subject.say(row, "as it was measured before")
        return row
    return subject.evaluate([theta], split)[0]


def _accuracy_said(row: Evaluation) -> str:
    if row["average"] is None or row["average_stderr"] is None:
        scores = row["accuracy"].items()
        return "".join(
            f"{score_header(task, score['metric'])} {score_text(score)}, " for task, score in scores
        )
    return f"accuracy {100 * row['average']:.1f} ± {100 * row['average_stderr']:.1f} %, "


def _mean_context(questions: Sequence[EncodedPrompt]) -> float:
    """Keys that a prompt's token attends to on average in the dense model."""
    lengths = [len(context) for question in questions for context in question.contexts]
    return (sum(lengths) / len(lengths) + 1) / 2
