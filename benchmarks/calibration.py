"""Does calibrating with routing on beat calibrating dense, for a routed model? A paired comparison on a finished run.

    python benchmarks/calibration.py RUN [--bits 3] [--thresholds 0.5 0.3] [--questions 300] [--json FILE]

The run's exported model is quantized by the engine native twice, on the same training sequences: once with second
moments of the tokens that execute a layer (routing on), once of all tokens (θ = 0). Both are scored on the same
validation questions; the standard error is that of the paired differences, with tasks weighted equally.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import parser, report

from qtale_lightning.cli import QTALECLI
from qtale_lightning.evaluation.accuracy import standard_error
from qtale_lightning.evaluation.scoring import score
from qtale_lightning.quantization import awq
from qtale_lightning.quantization.calibration import padded_batches
from qtale_lightning.quantization.checkpoint import quantize_model
from qtale_lightning.quantization.mappings import linear_shapes
from qtale_lightning.quantization.precision import uniform
from qtale_lightning.run import RunDirectory
from qtale_lightning.stages import load_exported


def main() -> None:
    """Measure and report."""
    options = parser(__doc__)
    options.add_argument("run", type=Path, help="directory of a finished run with routers")
    options.add_argument("--bits", type=int, nargs="*", default=[3])
    options.add_argument("--thresholds", type=float, nargs="*", default=[0.5, 0.3])
    options.add_argument("--questions", type=int, default=300, help="validation questions of each task")
    args = options.parse_args()
    run = RunDirectory(args.run)
    limit = str(8 if args.quick else args.questions)
    cli = QTALECLI(["--config", str(run.require_config()), "--data.limit_validation", limit], "calibration")
    data, quantization = cli.prepare_data(), cli.quantization
    questions = data.questions("validation")
    batches = padded_batches(data.calibration_sequences(quantization.sequences))

    found: dict[tuple[int, str, float], tuple[list[float], list[bool], float]] = {}
    for calibration, theta_searched in (("routing on", None), ("dense", 0.0)):
        model = load_exported(run)
        if theta_searched is not None:
            model.config.threshold = theta_searched
        precisions = [uniform(linear_shapes(model), bits, {}) for bits in args.bits]
        recipes = awq.search(model, batches, precisions, quantization.group_size)
        for bits, recipe in zip(args.bits, recipes, strict=True):
            packed = load_exported(run)
            quantize_model(packed, recipe)
            for theta in args.thresholds:
                scores = score(packed, questions, theta)
                pairs = list(zip(questions, scores.loglikelihoods, strict=True))
                nll = [-float(s[q.label]) / len(q.continuations[q.label]) for q, s in pairs]
                hits = [int((s / q.choice_lengths).argmax()) == q.label for q, s in pairs]
                found[bits, calibration, theta] = nll, hits, statistics.mean(scores.execution)
                print(bits, calibration, theta, statistics.mean(nll), statistics.mean(hits), flush=True)

    tasks = list(dict.fromkeys(question.task for question in questions))

    def by_task(values: Sequence[float]) -> tuple[float, float]:
        """Mean over tasks of the tasks' means, and its standard error."""
        parts = [[v for v, q in zip(values, questions, strict=True) if q.task == task] for task in tasks]
        errors = [standard_error(torch.tensor(part, dtype=torch.float64).numpy()) for part in parts]
        return statistics.mean(map(statistics.mean, parts)), math.hypot(*errors) / len(tasks)

    rows: list[dict[str, Any]] = []
    for bits in args.bits:
        for theta in args.thresholds:
            routed, dense = (found[bits, calibration, theta] for calibration in ("routing on", "dense"))
            worse, worse_error = by_task([a - b for a, b in zip(routed[0], dense[0], strict=True)])
            gained = [float(a) - float(b) for a, b in zip(routed[1], dense[1], strict=True)]
            gain, gain_error = by_task(gained)
            rows.append(
                {"bits": bits, "θ": theta}
                | {"nll routing on": by_task(routed[0])[0], "nll dense": by_task(dense[0])[0]}
                | {"difference": worse, "± nll": worse_error}
                | {"acc_norm difference %": 100 * gain, "± %": 100 * gain_error}
                | {"ratio routing on": routed[2], "ratio dense": dense[2], "questions": len(questions)}
            )
    report("calibration", rows, [], args.json)


if __name__ == "__main__":
    main()
