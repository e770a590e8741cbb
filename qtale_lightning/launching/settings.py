"""What a job of a cluster gets: `experiments/launch/<name>.yaml`, read and checked."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qtale_lightning.experiments import find, names
from qtale_lightning.yaml_files import read_yaml

FOLDER = Path("experiments/launch")


class ClusterSettings(BaseModel):
    """Of each job, which is one run of a table or a sweep on one machine.

    Attributes:
        cluster: ``slurm``; or ``local``: submitit's own processes on this machine, to try a file out.
        partition, account, qos: Slurm's; None leaves them to the cluster.
        gpus, cpus: Of a job.
        memory_gb: Of a job, GB; None leaves it to the cluster.
        hours: A job that needs longer is stopped in time, queued again and resumes, `resumes` times at most.
        at_once: Jobs of an array that run at a time (JOBS=… of make).
        setup: Lines of the shell before each job, such as ``module load cuda``.
        sbatch: Further options of sbatch by name, such as ``{constraint: a100}``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    cluster: Literal["slurm", "local"] = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus: Annotated[int, Field(ge=0)] = 1
    cpus: Annotated[int, Field(ge=1)] = 8
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    hours: Annotated[float, Field(gt=0)]
    resumes: Annotated[int, Field(ge=0)] = 3
    at_once: Annotated[int, Field(ge=1)] = 16
    setup: list[str] = Field(default_factory=list)
    sbatch: dict[str, str | int | float | bool] = Field(default_factory=dict)

    @classmethod
    def read(cls, name: str) -> Self:
        """The settings of a file of experiments/launch.

        Raises:
            FileNotFoundError: There is none; the message names those that are there.
            ValueError: It isn't YAML, or a key is wrong; the message names file and key.
        """
        path = find(FOLDER / f"{name}.yaml")
        if not path.is_file():
            raise FileNotFoundError(
                f"--launch {name} (LAUNCH=… of make): choose one of {', '.join(['local', *names('launch')])}"
            )
        try:
            return cls.model_validate(read_yaml(path))
        except ValidationError as error:
            problems = [
                f"{path}: {'.'.join(map(str, problem['loc'])) or 'top level'}: {problem['msg']}"
                for problem in error.errors(include_url=False)
            ]
            raise ValueError("\n".join(problems)) from None

    def parameters(self, name: str, at_once: int) -> dict[str, Any]:
        """Of submitit's AutoExecutor, for jobs of this name."""
        given = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "array_parallelism": at_once,
            "setup": self.setup or None,
            "additional_parameters": dict(self.sbatch) or None,
        }
        every = {
            "name": name,
            "timeout_min": max(1, round(60 * self.hours)),
            "cpus_per_task": self.cpus,
            "gpus_per_node": self.gpus or None,
            "mem_gb": self.memory_gb,
            **{f"slurm_{key}": value for key, value in given.items()},
        }
        return {key: value for key, value in every.items() if value is not None}
