"""What a killed, moved or damaged run goes on from, and that it ends as if nothing had happened."""

import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from qtale_lightning.callbacks import Checkpoints, Export, FiniteNumbers, RoutingMonitor, TrainingTotals
from qtale_lightning.checkpoints import RunCheckpointIO, exported_weights, resume_point
from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.finite import NonFiniteError
from qtale_lightning.manifest import DamagedFileError
from qtale_lightning.module import QTALEModule
from qtale_lightning.results.store import load_or_new
from qtale_lightning.run import RunDirectory

SCORES = {4: 3.0, 8: 1.0, 12: 2.0}  # by step: the second of three validations is the best


class Module(QTALEModule):
    """The tiny model, whose validations score as told."""

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.log("score", SCORES.get(self.trainer.global_step, 4.0))


class Faults(Callback):
    """Kills its process at an event, by number or name: hooks in front of those that save, and renames."""

    def __init__(self, kill_at: int | str | None, events: list[str]) -> None:
        self.kill_at, self.events = kill_at, events

    def event(self, name: str) -> None:
        if self.kill_at in (len(self.events), name):
            os.kill(os.getpid(), signal.SIGKILL)
        self.events.append(name)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.event(f"step {trainer.global_step}")

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.event(f"validation at {trainer.global_step} starts")

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.event(f"validation at {trainer.global_step} ends")

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.event("training ends")

    def on_fit_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.event("everything is trained")


def train(
    root: Path, *more: Callback, every: int = 3, steps: int = 12, accumulate: int = 1, validate_every: int = 4,
    export: bool = False, **options: Any
) -> Checkpoints:  # fmt: skip
    """Some steps in epochs of seven batches, from where the run stands, as the command line would."""
    run = RunDirectory(root)
    module = Module(name="tiny", router_width=16, lr=1e-3, ratio_schedule=0.5)
    data = CommonsenseDataModule(
        "facts", batch_size=4, limit_train=28, limit_validation=4, calibration_rows=4
    )
    data.tokenizer = module.tokenizer
    checkpoints = Checkpoints(run, every, "score")
    callbacks = [FiniteNumbers(), TrainingTotals(run), RoutingMonitor(run), *more, checkpoints]
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, use_distributed_sampler=False, default_root_dir=root, logger=False,
        accumulate_grad_batches=accumulate,
        val_check_interval=validate_every, check_val_every_n_epoch=None, plugins=[RunCheckpointIO(run.root)],
        callbacks=[*callbacks, *([Export(run)] if export else [])], **options,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume_point(run), weights_only=True)
    return checkpoints


def outcome(root: Path) -> dict[str, Any]:
    """What a run is worth: the weights of both checkpoints, and what it reports."""
    run = RunDirectory(root)
    last = torch.load(run.last, weights_only=True)
    results = cast(Any, load_or_new(root))
    train = {key: value for key, value in results["train"].items() if "second" not in key}
    return {
        "best": exported_weights(run), "last": last["state_dict"], "step": last["global_step"], "train": train,
        "routing": results["routing"], "chosen": last["callbacks"]["Checkpoints"],
    }  # fmt: skip


def same(one: Any, other: Any) -> bool:
    """Whether two outcomes are equal to the last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def in_a_child(work: Callable[[], object]) -> int:
    """Do something in a process of its own; its exit status, negative for a signal's."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:  # pytest's own ends aren't the child's
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train_with_faults(root: Path, kill_at: int | str | None = None, **options: Any) -> list[str]:
    """Train, and die at an event if told to. Renames are those of checkpoints and of the list of files."""
    faults = Faults(kill_at, [])
    replace = os.replace

    def renamed(source: Path, target: Path) -> None:
        faults.event(f"{Path(target).name} is to be replaced")
        replace(source, target)

    os.replace = renamed  # type: ignore[assignment]
    try:
        train(root, faults, **options)
    finally:
        os.replace = replace
    return faults.events


def killed_and_resumed(root: Path, kill_at: int, **options: Any) -> dict[str, Any]:
    assert in_a_child(lambda: train_with_faults(root, kill_at, **options)) == -signal.SIGKILL
    train(root, **options)
    return outcome(root)


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "cut":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run that nothing happened to, and what happened in it."""
    root = tmp_path_factory.mktemp("whole")
    return root, train_with_faults(root)


@pytest.fixture
def copy(whole: tuple[Path, list[str]], tmp_path: Path) -> RunDirectory:
    """That run, at another place."""
    return RunDirectory(shutil.copytree(whole[0], tmp_path / "copy"))


# ------------------------------------------------------------------------------------------- killed and resumed


@pytest.mark.slow
def test_a_run_killed_around_its_validations_ends_as_if_it_had_not_been(
    whole: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """At the steps that a save and a validation fall on, and between best.ckpt and last.ckpt."""
    expected, events = outcome(whole[0]), whole[1]
    assert (expected["chosen"], expected["step"]) == ({"best_score": 1.0, "best_step": 8}, 12)
    assert expected["train"]["steps"] == 12
    best = [i for i, name in enumerate(events) if name == "best.ckpt is to be replaced"]
    last = [i for i, name in enumerate(events) if name == "last.ckpt is to be replaced"]
    behind_best = next(i for i in last if i > best[-1])
    for kill_at in (best[0], behind_best, events.index("validation at 12 starts"), last[-1], len(events) - 1):
        found = killed_and_resumed(tmp_path / str(kill_at), kill_at)
        assert same(found, expected), f"killed where {events[kill_at]} (event {kill_at})"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"every": 1, "validate_every": 7, "steps": 15}, {"validate_every": 5, "steps": 6, "accumulate": 3}],
    ids=["saves and validations coincide", "at an epoch's end, too", "between steps, too"],
)
def test_a_run_killed_anywhere_ends_as_if_it_had_not_been(options: dict[str, Any], tmp_path: Path) -> None:
    """At every event in `make test-faults`; in the daily suite at a few, spread over the run."""
    events = train_with_faults(tmp_path / "whole", **options)
    expected = outcome(tmp_path / "whole")
    step = 1 if os.environ.get("QTALE_FAULT_TRIALS") else len(events) // 3
    for kill_at, name in list(enumerate(events))[step // 2 :: step]:
        found = killed_and_resumed(tmp_path / str(kill_at), kill_at, **options)
        assert same(found, expected), f"killed where {name} (event {kill_at})"
        shutil.rmtree(tmp_path / str(kill_at))


@pytest.mark.slow
def test_a_run_that_was_moved_keeps_its_best_checkpoint(
    whole: tuple[Path, list[str]], tmp_path: Path
) -> None:
    kill_at = "validation at 12 starts"
    assert in_a_child(lambda: train_with_faults(tmp_path / "old", kill_at)) == -signal.SIGKILL
    shutil.move(tmp_path / "old", tmp_path / "new")
    train(tmp_path / "new")
    assert same(outcome(tmp_path / "new"), outcome(whole[0]))


@pytest.mark.slow
def test_a_run_told_to_end_in_its_last_moment_doesnt_begin_what_follows(tmp_path: Path) -> None:
    """Lightning looks for SIGTERM between steps only."""

    class Told(Callback):
        def on_train_end(self, *_: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SIGTERMException):
        train(tmp_path, Told(), export=True)
    assert not RunDirectory(tmp_path).model().exists()
    train(tmp_path, export=True)
    assert RunDirectory(tmp_path).model().is_dir()
    assert load_or_new(tmp_path)["train"]["steps"] == 12


# ------------------------------------------------------------------------------------------------------ damages


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_the_one_before_is_used_where_the_newest_is_damaged(
    how: str, whole: tuple[Path, list[str]], copy: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the process dies again while it saves: the damaged one never takes the good one's place."""
    damage(copy.last, how)
    assert resume_point(copy) == copy.previous
    assert f"{copy.last} isn't what this run wrote" in caplog.text
    saving = "last.ckpt is to be replaced"
    assert in_a_child(lambda: train_with_faults(copy.root, saving)) == -signal.SIGKILL
    assert resume_point(copy) == copy.previous
    train(copy.root)
    assert same(outcome(copy.root), outcome(whole[0]))


def test_where_all_are_damaged_the_message_says_the_way_out(copy: RunDirectory) -> None:
    damage(copy.last, "cut")
    damage(copy.previous, "flipped")
    with pytest.raises(DamagedFileError, match=r"last\.ckpt isn't .*: remove .*checkpoints.* trains again"):
        resume_point(copy)


def test_a_damaged_checkpoint_that_no_list_knows_is_named(copy: RunDirectory) -> None:
    (copy.root / "manifest.json").unlink()
    damage(copy.last, "cut")
    with pytest.raises(DamagedFileError, match=r"last\.ckpt is no whole checkpoint .*: remove it"):
        train(copy.root)


@pytest.mark.parametrize("content", [b"", b"{}", b"PK\x03\x04", b"\x80\x02}q\x00."])
def test_something_else_in_a_checkpoints_place_is_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    file.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"last\.ckpt is no whole checkpoint"):
        RunCheckpointIO(tmp_path).load_checkpoint(file)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [False, True])
def test_a_best_checkpoint_that_is_gone_is_missed_before_training(lost: bool, tmp_path: Path) -> None:
    assert in_a_child(lambda: train_with_faults(tmp_path, "step 10")) == -signal.SIGKILL
    run = RunDirectory(tmp_path)
    if lost:
        run.best.unlink()
    else:
        damage(run.best, "flipped")
    with pytest.raises(DamagedFileError, match=r"best\.ckpt.*: remove .*checkpoints"):
        train(tmp_path)


def test_an_exported_run_needs_no_best_checkpoint(copy: RunDirectory) -> None:
    copy.model().mkdir()
    copy.best.unlink()
    train(copy.root, export=True)


def test_a_lost_best_checkpoint_isnt_replaced_by_another_state(copy: RunDirectory) -> None:
    copy.best.unlink()
    with pytest.raises(DamagedFileError, match=r"best\.ckpt, of step 8, is missing"):
        train(copy.root, export=True)


def test_a_checkpoint_of_elsewhere_brings_no_best_one(whole: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Its score isn't one of this run's: the run's own validations choose."""
    checkpoints = Checkpoints(RunDirectory(tmp_path), 3, "score")
    checkpoints.load_state_dict({"best_score": 0.5, "best_step": 8})
    trainer: Any = type(
        "Trainer", (), {"global_step": 8, "ckpt_path": str(whole[0] / "checkpoints/last.ckpt")}
    )
    checkpoints.on_train_start(trainer, Module(name="tiny"))
    assert (checkpoints.best_score, checkpoints.best_step) == (None, None)


# -------------------------------------------------------------------------------------------------- no validation


@pytest.mark.slow
def test_where_no_validation_was_due_one_is_made_at_the_end(tmp_path: Path) -> None:
    checkpoints = train(tmp_path, validate_every=100)
    assert checkpoints.state_dict() == {"best_score": 2.0, "best_step": 12}
    assert load_or_new(tmp_path)["routing"]["paths"]["tokens"] > 0  # the validation's record
    assert torch.load(RunDirectory(tmp_path).best, weights_only=True)["global_step"] == 12


@pytest.mark.slow
def test_where_there_is_no_validation_the_last_state_is_exported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, limit_val_batches=0)
    run = RunDirectory(tmp_path)
    assert "no validation ran" in caplog.text
    last = torch.load(run.last, weights_only=True)
    assert same(exported_weights(run), last["state_dict"])
    # As a run ended that knew no such way: it can be exported still.
    run.best.unlink()
    last["callbacks"].pop("Checkpoints")
    (run.root / "manifest.json").unlink()
    torch.save(last, run.last)
    train(tmp_path, export=True, limit_val_batches=0)
    assert run.model().is_dir()


# ------------------------------------------------------------------------------------------------- how it is saved


def state() -> dict[str, Any]:
    return {"state_dict": {"weight": torch.ones(100_000)}}


def test_the_systems_temporary_folder_isnt_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mkstemp", "mkdtemp", "NamedTemporaryFile"):
        monkeypatch.delattr("tempfile." + name)
    RunCheckpointIO(tmp_path).save_checkpoint(state(), tmp_path / "checkpoints" / "last.ckpt")
    assert resume_point(RunDirectory(tmp_path)) == tmp_path / "checkpoints" / "last.ckpt"


def test_a_full_disk_is_named_and_keeps_what_was_there(tmp_path: Path) -> None:
    """A limit to a file's size, as the system enforces it, stands for the disk's end."""
    io, file = RunCheckpointIO(tmp_path), tmp_path / "checkpoints" / "last.ckpt"
    io.save_checkpoint(state(), file)
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OSError, match=r"(large|space).*last\.ckpt"):
            io.save_checkpoint(state(), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert resume_point(RunDirectory(tmp_path)) == file
    assert [path.name for path in file.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_arent_finite_are_never_saved(value: float, tmp_path: Path) -> None:
    io, file = RunCheckpointIO(tmp_path), tmp_path / "checkpoints" / "last.ckpt"
    io.save_checkpoint(state(), file)
    before = file.read_bytes()
    damaged = state()
    damaged["state_dict"]["weight"][3] = value
    with pytest.raises(NonFiniteError, match=r"weight has NaN or infinity: .*last\.ckpt isn't written"):
        io.save_checkpoint(damaged, file)
    assert file.read_bytes() == before
