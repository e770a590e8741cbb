"""A sweep file in W&B's own format, and the command line that it makes of a point."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qtale_lightning.yaml_files import read_yaml

VARIABLE = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")
"""W&B's macro for an environment variable."""


class Metric(BaseModel):
    """What W&B shows as the sweep's aim."""

    model_config = ConfigDict(extra="forbid")

    name: str
    goal: Literal["minimize", "maximize"] = "minimize"


class SweepDefinition(BaseModel):
    """The keys of a sweep file that the suite uses; others are W&B's alone and are kept for it.

    Attributes:
        parameters: By flat dotted key, such as model.lambda_entropy; each as W&B declares it.
        command: With W&B's macros ${env}, ${interpreter}, ${program}, ${args} and ${envvar:NAME}.
        run_cap: The most runs there may be.
    """

    model_config = ConfigDict(extra="allow", strict=True)

    name: str
    program: str
    method: Literal["grid", "random", "bayes"]
    metric: Metric
    parameters: dict[str, dict[str, Any]] = Field(min_length=1)
    command: list[str]
    run_cap: int | None = Field(default=None, ge=1)

    def variables(self) -> list[str]:
        """Names of the environment variables that the command needs."""
        return list(dict.fromkeys(name for part in self.command for name in VARIABLE.findall(part)))

    def resolved(self, environment: Mapping[str, str], options: Sequence[str] = ()) -> "SweepDefinition":
        """The sweep with its variables' values, and options more for every run, in the command itself.

        So an agent on another machine needs nothing but the sweep's name.

        Raises:
            ValueError: A variable is missing or empty.
        """
        missing = [name for name in self.variables() if not environment.get(name)]
        if missing:
            given = " ".join(f"{name}=…" for name in missing)
            raise ValueError(
                f"sweep {self.name} needs {', '.join(missing)}: make sweep SWEEP={self.name} {given}"
            )
        command = [VARIABLE.sub(lambda found: environment[found[1]], part) for part in self.command]
        end = command.index("--")
        return self.model_copy(update={"command": [*command[:end], *options, *command[end:]]})

    def arguments(self, point: Mapping[str, Any]) -> list[str]:
        """What `trial` is given for a point, as W&B's agent makes it of the command."""
        given = [f"--{name}={value}" for name, value in point.items()]
        behind = self.command[self.command.index("trial") + 1 :]
        return [argument for part in behind for argument in (given if part == "${args}" else [part])]


def read_sweep(file: Path) -> SweepDefinition:
    """Reads and checks a sweep file.

    Raises:
        FileNotFoundError: It isn't there; those that are get listed.
        ValueError: It isn't YAML, a key is missing or wrong, or its command isn't of the form that `trial` takes; the
            message names the file and the key.
    """
    if not file.is_file():
        known = ", ".join(sorted(other.stem for other in file.parent.glob("*.yaml"))) or "none"
        raise FileNotFoundError(f"there is no sweep {file}; known in {file.parent}: {known}")
    try:
        sweep = SweepDefinition.model_validate(read_yaml(file))
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or 'top level'}: {problem['msg']}"
            for problem in error.errors(include_url=False)
        ]
        raise ValueError(f"{file}: {'; '.join(problems)}") from None
    for name, parameter in sweep.parameters.items():
        if "parameters" in parameter:
            raise ValueError(f"{file}: parameters.{name}: nested; write flat dotted keys, such as {name}.lr")
    if "trial" not in sweep.command or sweep.command[-2:] != ["--", "${args}"]:
        raise ValueError(
            f"{file}: command: must run `trial` and end in -- and ${{args}}, as sweeps/lambda2.yaml does"
        )
    return sweep
