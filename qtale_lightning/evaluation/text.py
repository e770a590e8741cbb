"""What is measured of texts: the perplexity of reference answers, and the ROUGE of written ones."""

import math
from collections.abc import Sequence

import numpy as np
from torchmetrics.functional.text.rouge import rouge_score

from qtale_lightning.data.tokenization import EncodedPrompt

# rougeLsum is left out: it splits sentences by nltk's punkt, which has to be downloaded.
ROUGE = ("rouge1", "rouge2", "rougeL")


def text_measures(
    questions: Sequence[EncodedPrompt],
    scores: Sequence[np.ndarray],
    metric: str,
    texts: Sequence[str] | None = None,
) -> dict[str, object]:
    """One task's row of results: value and standard error of its metric, and what else is known of its texts.

    Args:
        questions: Each with one choice, the reference.
        scores: Per question, the reference's summed log-likelihood in nats, ``(1,)``.
        metric: ``perplexity``, or ``rougeL``.
        texts: What the model wrote, one a question; needed for ``rougeL``.
    """
    nlls = np.array([-float(score[0]) for score in scores])
    tokens = np.array([len(question.continuations[0]) for question in questions])
    nll, nll_stderr = nll_per_token(nlls, tokens)
    perplexity = math.exp(nll)
    measures = {
        "perplexity": perplexity,
        "perplexity_stderr": perplexity * nll_stderr,  # the delta method: d exp(x) = exp(x) dx
        "nll": nll,
        "nll_stderr": nll_stderr,
        "tokens": int(tokens.sum()),
        "examples": len(questions),
    }
    if metric == "rougeL":
        assert texts is not None
        measures |= rouge(texts, [question.choices[0] for question in questions])
    return {"metric": metric, "value": measures[metric], "stderr": measures[f"{metric}_stderr"], **measures}


def nll_per_token(nlls: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """Total nll over total tokens, and its standard error, rows being independent.

        r = Σ nll / Σ n,    se(r) = √( N / (N − 1) · Σ (nll − r · n)² ) / Σ n

    The error is the delta method's for a ratio of two means; 0 for a single row.

    Args:
        nlls: Summed nll of each row in nats, ``(N,)``.
        tokens: Tokens of each row, ``(N,)``.
    """
    ratio = float(nlls.sum() / tokens.sum())
    count = len(nlls)
    if count < 2:
        return ratio, 0.0
    spread = float(((nlls - ratio * tokens) ** 2).sum()) * count / (count - 1)
    return ratio, math.sqrt(spread) / float(tokens.sum())


def rouge(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean ROUGE-1, -2 and -L (F1, in 0..1, no stemming) and their standard errors, by torchmetrics."""
    found: dict[str, list[float]] = {key: [] for key in ROUGE}
    for text, reference in zip(texts, references, strict=True):
        scores = rouge_score(text, reference, rouge_keys=ROUGE)
        for key in ROUGE:
            found[key].append(float(scores[f"{key}_fmeasure"]))
    measures: dict[str, float] = {}
    for key, values in found.items():
        measures |= {key: float(np.mean(values)), f"{key}_stderr": standard_error(np.array(values))}
    return measures


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean of independent values; 0 for a single one."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
