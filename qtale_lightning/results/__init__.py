"""What stages write and read: a run's `results.json`, what was answered to each question, and what made both."""

from qtale_lightning.results.schema import Results, validate
from qtale_lightning.results.store import load_results, save_results, update_results, upsert_evaluation

__all__ = ["Results", "load_results", "save_results", "update_results", "upsert_evaluation", "validate"]
