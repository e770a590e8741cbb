"""Suites: tasks that are trained on and reported together, in this order."""

from qtale_lightning.tasks.registry import register_suite

register_suite("csqa", "piqa", "boolq", "social_iqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa")
register_suite("generality", "mmlu", "alpaca", "samsum")
