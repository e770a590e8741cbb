"""A task's scores as text."""

from qtale_lightning.results.scores import ChoiceScores, TextScores


def score_header(name: str, metric: str) -> str:
    """The heading of a task's column; an arrow where lower is better."""
    measures = {"perplexity": "perplexity ↓", "rougeL": "ROUGE-1 / 2 / L %"}
    return f"{name} {measures.get(metric, '%')}"


def score_text(score: ChoiceScores | TextScores) -> str:
    """A task's value ± standard error: a perplexity as it is, anything else in percent."""
    if score["metric"] == "perplexity":
        return f"{score['value']:.3f} ± {score['stderr']:.3f}"
    value = f"{100 * score['value']:.2f} ± {100 * score['stderr']:.2f}"
    if score["metric"] == "rougeL":
        return f"{100 * score['rouge1']:.2f} / {100 * score['rouge2']:.2f} / {value}"
    return value
