"""Tasks, one declaration a file: where rows come from, how they are asked, what is measured, what they are called.

A module of this package that calls :func:`register` adds a task; nothing else has to know of it.
"""

from importlib import import_module
from pkgutil import iter_modules

from qtale_lightning.tasks.registry import (
    SUITES,
    TASKS,
    built_in,
    register,
    register_suite,
    resolve_tasks,
    task_title,
)
from qtale_lightning.tasks.task import HubSource, Metric, Question, Row, Split, Task

__all__ = [
    "SUITES",
    "TASKS",
    "HubSource",
    "Metric",
    "Question",
    "Row",
    "Split",
    "Task",
    "built_in",
    "register",
    "register_suite",
    "resolve_tasks",
    "task_title",
]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
