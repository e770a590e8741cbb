"""Jobs through submitit: on its local executor for real, and on a Slurm of shell scripts."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import submitit
import yaml

from qtale_lightning.launching import Cluster, Command, Job, Steps, cluster, launcher
from qtale_lightning.launching.settings import ClusterSettings
from qtale_lightning.launching.work import Work

ROOT = Path(__file__).parents[2]
Noting = Callable[..., Job]
Ended = dict[str, int | str]

SBATCH = """#!/bin/sh
# Runs the jobs of an array here, one after the other, or notes that they are pending.
cp "$1" {folder}/submitted.sh
echo "$@" >> {folder}/calls
jobs=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
id=$(( $(cat {folder}/id 2>/dev/null || echo 70) + 1 )); echo $id > {folder}/id
echo "Submitted batch job $id"
[ -e {folder}/busy ] && exit 0
( [ -z "$jobs" ] && export SLURM_JOB_ID=$id && sh "$1"
  [ -n "$jobs" ] && for n in $(seq 0 $jobs); do
    SLURM_JOB_ID=$id SLURM_ARRAY_JOB_ID=$id SLURM_ARRAY_TASK_ID=$n sh "$1"
  done ) > {folder}/output 2>&1 &
"""
SRUN = """#!/bin/sh
while [ "$1" != "{python}" ]; do shift; done
export SLURM_NTASKS=1 SLURM_PROCID=0 SUBMITIT_EXECUTOR=slurm
exec "$@"
"""
SACCT = """#!/bin/sh
echo "JobID|State|NodeList"
for word in "$@"; do case $word in [0-9]*) echo "$word|$(cat {folder}/state)|here";; esac; done
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "POLL", 0.05)
    monkeypatch.setattr(cluster, "PATIENCE", 0.2)


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in the suite's place, for jobs that are processes: it notes its arguments and variables in a folder."""
    place = tmp_path / "place" / "qtale_lightning"
    place.mkdir(parents=True)
    for part in ("files", "locks", "launching", "experiments", "yaml_files"):
        source = ROOT / "qtale_lightning" / part
        (place / source.with_suffix(".py").name if not source.is_dir() else place / part).symlink_to(
            source if source.is_dir() else source.with_suffix(".py")
        )
    (place / "__init__.py").touch()
    (place / "__main__.py").write_text(
        "import json, os, pathlib, sys, time\n"
        "name, number = sys.argv[1:]\n"
        "told = {'slurm': [key for key in os.environ if key.startswith(('SLURM', 'SUBMITIT'))], 'pid': os.getpid()}\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "(folder / f'{name}-{number}.ran').write_text(json.dumps(told))\n"
        "print('said by', name, flush=True)\n"
        "while (folder / 'wait').exists(): time.sleep(0.02)\n"
        "sys.exit(3 if name == 'bad' else 0)\n"
    )
    monkeypatch.chdir(tmp_path / "place")  # where `python -m` looks first
    return tmp_path


def settings(**more: Any) -> ClusterSettings:
    return ClusterSettings.model_validate({"hours": 1, "gpus": 0, **more})


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_jobs_run_and_a_failure_stops_no_other(suite: Path, job: Noting, ended: Ended) -> None:
    Cluster(settings(cluster="local"), suite / "jobs").run([job("good", 2), job("bad", 2), job("third")])
    assert ended == {"good": 0, "bad": 3, "third": 0}
    assert {file.stem for file in suite.glob("*.ran")} == {"good-0", "good-1", "bad-0", "third-0"}
    log = (suite / "good" / "log.txt").read_text(encoding="utf-8")
    assert log.splitlines()[:2] == ["$ python -m qtale_lightning good 0", "said by good"]
    assert json.loads((suite / "good-0.ran").read_text())["slurm"] == [], "it isn't a task of the cluster's"
    assert json.loads((suite / "jobs" / "submitted.json").read_text()) == {}
    assert not list((suite / "jobs").glob("*.status"))


@pytest.mark.slow
def test_ctrl_c_cancels_what_was_submitted(suite: Path, job: Noting, ended: Ended) -> None:
    (suite / "wait").touch()

    def interrupt() -> None:
        wait_for(lambda: (suite / "good-0.ran").is_file() and bool((suite / "good-0.ran").read_text()))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        Cluster(settings(cluster="local"), suite / "jobs").run([job("good", 2)])
    thread.join()
    assert ended == {"good": "stopped"}
    process = json.loads((suite / "good-0.ran").read_text())["pid"]
    wait_for(lambda: not _alive(process))
    assert not (suite / "good-1.ran").exists()
    (suite / "wait").unlink()
    Cluster(settings(cluster="local"), suite / "jobs").run([job("good", 2)])
    assert ended == {"good": 0}


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_job_whose_time_is_over_is_queued_again(suite: Path) -> None:
    """By submitit's own signal; the command is told to end first, so that it saves what it resumes from."""
    (suite / "wait").touch()
    executor = submitit.AutoExecutor(suite / "jobs", "local")
    executor.update_parameters(timeout_min=60)
    job = executor.submit(Work(("good", "0"), str(suite / "log"), str(suite / "status")))
    ran = suite / "good-0.ran"
    wait_for(lambda: ran.is_file() and bool(ran.read_text()))
    first = json.loads(ran.read_text())["pid"]
    (task,) = psutil.Process(job._process.pid).children()
    task.send_signal(signal.SIGUSR2)
    wait_for(lambda: json.loads(ran.read_text() or "{}").get("pid", first) != first)
    assert not _alive(first)
    (suite / "wait").unlink()
    wait_for(job.done)
    assert (suite / "status").read_text() == "0"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands named like Slurm's."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "state").write_text("COMPLETED")
    scancel = '#!/bin/sh\necho "$@" >> {folder}/cancelled\n'
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT, "scancel": scancel}.items():
        file = folder / name
        filled = text.replace("{folder}", str(folder)).replace("{python}", sys.executable)
        file.write_text(filled)
        file.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


@pytest.mark.slow
def test_slurm_gets_an_array_with_what_the_file_says(
    suite: Path, slurm: Path, job: Noting, ended: Ended
) -> None:
    given = settings(
        partition="long", gpus=2, memory_gb=48, hours=1.5, at_once=4, sbatch={"constraint": "a100"}
    )
    Cluster(given, suite / "jobs", jobs=1).run([job("good"), job("bad")])
    assert ended == {"good": 0, "bad": 3}
    assert len((slurm / "calls").read_text().splitlines()) == 1, "one array"
    script = (slurm / "submitted.sh").read_text()
    for option in (
        *("--array=0-1%1", "--partition=long", "--gpus-per-node=2", "--mem=48GB", "--time=90"),
        *("--constraint=a100", "--cpus-per-task=8"),
    ):
        assert f"#SBATCH {option}\n" in script
    assert json.loads((suite / "good-0.ran").read_text())["slurm"] == []


@pytest.mark.slow
def test_a_killed_launchers_jobs_are_watched_again(
    suite: Path, slurm: Path, job: Noting, ended: Ended
) -> None:
    (slurm / "busy").touch()  # what is submitted is pending
    (slurm / "state").write_text("PENDING")
    folder = suite / "jobs"
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from qtale_lightning.launching import *; from qtale_lightning.launching.settings import ClusterSettings\n"
        "def steps():\n    yield Command(('good', '0'), Path('log.txt'))\n"
        "job = Job(Path(sys.argv[2]) / 'good', 'a test', steps)\n"
        "Cluster(ClusterSettings(hours=1), Path(sys.argv[2]) / 'jobs').run([job])\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(ROOT), str(suite)]) as first:
        wait_for((folder / "submitted.json").is_file)
        first.kill()
    (entry,) = json.loads((folder / "submitted.json").read_text()).values()
    Path(entry["status"]).write_text("0")  # it has run since
    Cluster(settings(), folder).run([job("good")])
    assert ended == {"good": 0}
    assert len((slurm / "calls").read_text().splitlines()) == 1, "nothing was submitted again"


def test_a_job_that_is_gone_failed(suite: Path, slurm: Path, job: Noting, ended: Ended) -> None:
    (slurm / "busy").touch()
    (slurm / "state").write_text("OUT_OF_MEMORY")
    Cluster(settings(), suite / "jobs").run([job("good", 2)])
    assert ended == {"good": cluster.LOST}


def test_jobs_on_one_folder_take_turns(suite: Path, slurm: Path) -> None:
    submitted: list[int] = []
    (slurm / "state").write_text("FAILED")
    (slurm / "busy").touch()

    def steps() -> Steps:
        submitted.append(len((slurm / "calls").read_text().splitlines()) if submitted else 0)
        yield Command(("good", "0"), suite / "log.txt")

    Cluster(settings(), suite / "jobs").run([Job(suite, "a test", steps)] * 2)
    assert submitted == [0, 1]


def test_without_slurm_it_is_said(tmp_path: Path, job: Noting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"there is no slurm here.*start this on a machine that has it"):
        Cluster(settings(), tmp_path / "jobs").run([job("good")])


def test_the_shipped_file_can_be_read_and_others_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launcher("slurm", None, tmp_path).at_once == 16
    assert launcher("slurm", 4, tmp_path).at_once == 4
    with pytest.raises(FileNotFoundError, match=r"--launch slrum.*choose one of local, slurm"):
        launcher("slrum", None, tmp_path)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "experiments" / "launch" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(yaml.safe_dump({"hours": -1, "gpu": 1}))
    with pytest.raises(ValueError, match=r"mine\.yaml: hours: .*\n.*mine\.yaml: gpu: "):
        launcher("mine", None, tmp_path)
