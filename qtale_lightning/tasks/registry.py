"""The tasks by name, and suites of them."""

from collections.abc import Sequence

from qtale_lightning.tasks.task import Task

TASKS: dict[str, Task] = {}
SUITES: dict[str, tuple[str, ...]] = {}


def register(task: Task) -> Task:
    """Makes a task known by its name, and returns it.

    Raises:
        ValueError: The name is another task's or a suite's, or can't be a name in a list of tasks.
    """
    _check_new(task.name)
    TASKS[task.name] = task
    return task


def register_suite(name: str, *tasks: str) -> None:
    """Makes tasks known together, in their order.

    Raises:
        ValueError: as `register`.
    """
    _check_new(name)
    SUITES[name] = tasks


def _check_new(name: str) -> None:
    if name in TASKS or name in SUITES:
        raise ValueError(f"there is a task or suite {name!r} already: choose another name")
    if not name.replace("_", "").isalnum():
        raise ValueError(f"{name!r} can't name a task: use letters, digits and '_'")


def resolve_tasks(spec: str | Sequence[str]) -> tuple[str, ...]:
    """Task names of a task, a suite, a list of them, or a comma-separated string; each name once, in order.

    Raises:
        ValueError: A name is unknown, or none is given.
    """
    parts = [spec] if isinstance(spec, str) else list(spec)
    names: dict[str, None] = {}
    for name in (name.strip() for part in parts for name in part.split(",")):
        if name not in TASKS and name not in SUITES:
            known = ", ".join([*SUITES, *TASKS])
            raise ValueError(f"unknown task {name!r} (--data.tasks); known suites and tasks: {known}")
        names.update(dict.fromkeys(SUITES.get(name, (name,))))
    if not names:
        raise ValueError(
            f"no task given (--data.tasks); known suites and tasks: {', '.join([*SUITES, *TASKS])}"
        )
    return tuple(names)


def task_title(name: str) -> str:
    """What tables and figures call a task; of one that isn't known any more, its name."""
    return (TASKS[name].title if name in TASKS else "") or name


def built_in() -> list[str]:
    """Tasks that make their rows themselves: they need no files and no network."""
    return [name for name, task in TASKS.items() if task.generate is not None]
