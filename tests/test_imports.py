"""The layers of the package, read from its sources: data → models → losses → module → callbacks → report."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "qtale_lightning"

# What a part may import of the package besides itself. Parts that aren't named here are above the callbacks, or
# beside them, and may import everything below.
MAY_IMPORT = {
    "allocator": set(),
    "architectures": set(),
    "batching": set(),
    "bits_schedule": set(),
    "checks": {"schedule"},
    "checkpoints": {"files", "finite", "manifest", "run"},
    "configuration": {
        *(
            "architectures",
            "checks",
            "data",
            "evaluation",
            "options",
            "quantization",
            "routing",
            "run",
            "settings",
        ),
        *("strategy", "values"),
    },
    "compat": set(),
    "cpu": {"files", "precision"},
    "cuda": {"compat"},
    "files": set(),
    "finite": set(),
    "hub": {"compat"},
    "huge_pages": {"allocator"},
    "data": {"digests", "hub", "lazy", "tasks", "values"},
    "lazy": set(),
    "launching": {"experiments", "files", "locks", "yaml_files"},
    "locks": set(),
    "models": {
        *(
            "architectures",
            "bits_schedule",
            "compat",
            "cpu",
            "cuda",
            "files",
            "hub",
            "huge_pages",
            "lazy",
            "routing",
            "watch",
        ),
    },
    "losses": set(),
    "digests": {"manifest"},
    "manifest": {"files"},
    "machine": {"compat", "cpu", "precision", "wandb_session"},
    "metrics": {"models", "paths", "routing"},
    "options": {
        *("checks", "data", "evaluation", "experiments", "quantization", "settings", "values"),
        "yaml_files",
    },
    "paths": set(),
    "precision": set(),
    "quantization": {
        *(
            "architectures",
            "batching",
            "compat",
            "cpu",
            "cuda",
            "huge_pages",
            "manifest",
            "routing",
            "values",
            "watch",
        ),
    },
    "results": {"cpu", "data", "digests", "evaluation", "manifest", "quantization", "settings", "tasks"},
    "report": {"evaluation", "files", "lazy", "manifest", "results", "routing", "tasks"},
    "errors": set(),
    "experiments": set(),
    "evaluation": {
        *("data", "finite", "losses", "manifest"),
        *("architectures", "batching", "metrics", "models", "paths", "quantization", "routing", "values"),
    },
    "harness": {
        "data",
        "digests",
        "hub",
        "manifest",
        "quantization",
        "report",
        "results",
        "run",
        "stages",
        "tasks",
    },
    "module": {"allocator", "losses", "metrics", "models", "routing", "settings", "training"},
    "routing": {"cpu", "huge_pages", "losses", "values", "watch"},
    "run": {"checks", "files", "locks", "manifest", "quantization", "yaml_files"},
    "schedule": set(),
    "settings": {"architectures", "models", "routing", "values"},
    "strategy": {"checkpoints", "models"},
    "sweeps": {"files", "launching", "locks", "report", "results", "routing", "wandb_session", "yaml_files"},
    "tasks": set(),
    "tracking": {"settings", "wandb_session"},
    "training": {"architectures", "losses", "models", "quantization", "routing"},
    "wandb_session": {"files", "settings"},
    "values": set(),
    "watch": set(),
    "yaml_files": set(),
}
# Of these, the only ones that know Lightning.
LIGHTNING = {"checkpoints.py", "data/datamodule.py", "module.py", "strategy.py", "tracking.py"}
ABOVE = {"callbacks", "cli", "commands", "doctor", "memory", "plan", "tables", "__main__"}
# The parts that callbacks are made from, so that can't import them.
BELOW = {*MAY_IMPORT, "stages"}


def part_of(file: Path) -> str:
    """The subpackage or module that a source file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: Path) -> set[str]:
    """Full names of everything that a file imports, wherever in the file."""
    package = ["qtale_lightning", *file.relative_to(PACKAGE).parts[:-1]]
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def parts_imported(file: Path) -> set[str]:
    """The package's other parts that a file imports."""
    ours = (name.split(".") for name in imported(file) if name.startswith("qtale_lightning."))
    return {name[1] for name in ours} - {part_of(file)}


def sources(*parts: str) -> list[Path]:
    return [file for file in sorted(PACKAGE.rglob("*.py")) if part_of(file) in parts]


def test_every_layer_has_sources() -> None:
    assert {part_of(file) for file in sources(*BELOW, *ABOVE)} == BELOW | ABOVE


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_layer_imports_only_what_is_below_it(part: str) -> None:
    found = {
        str(file.relative_to(PACKAGE)): parts_imported(file) - MAY_IMPORT[part] for file in sources(part)
    }
    assert {file: parts for file, parts in found.items() if parts} == {}


def test_nothing_below_the_callbacks_imports_them_or_the_command_line() -> None:
    found = {str(file.relative_to(PACKAGE)): parts_imported(file) & ABOVE for file in sources(*BELOW)}
    assert {file: parts for file, parts in found.items() if parts} == {}


def test_lightning_stays_where_it_belongs() -> None:
    users = {
        str(file.relative_to(PACKAGE))
        for file in sources(*BELOW)
        if any(name.split(".")[0] in ("lightning", "pytorch_lightning") for name in imported(file))
    }
    assert users == LIGHTNING
