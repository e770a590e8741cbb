import json
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from qtale_lightning.data import CommonsenseDataModule, EncodedPrompt, LengthBatchSampler
from qtale_lightning.tasks import SUITES, TASKS

Ids = tuple[int, ...]


def facts_data(tokenizer: PreTrainedTokenizerFast, **options: Any) -> CommonsenseDataModule:
    data = CommonsenseDataModule(**{"tasks": "facts", "batch_size": 4, "calibration_rows": 8} | options)
    data.tokenizer = tokenizer
    return data


def trained_on(data: CommonsenseDataModule) -> list[Ids]:
    """Sequences of one epoch, without padding, in the order in which they come."""
    return [
        tuple(row[mask.bool()].tolist())
        for batch in data.train_dataloader()
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def test_examples_are_the_first_training_rows_but_the_question(
    local_root: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Calibration questions are held out of the training rows, where examples come from."""
    options = {"tasks": "piqa,boolq", "root": str(local_root), "shots": 2, "calibration_rows": 19}
    data = CommonsenseDataModule(**options)
    data.tokenizer = tokenizer
    data.setup()
    for split in ("validation", "calibration"):
        for question in data.questions(split):
            first, second, asked = tokenizer.decode(question.contexts[0]).split("\n\n")
            if question.task == "piqa":  # rows 10 on are training rows
                number = int(asked.removeprefix("Question: goal ").removesuffix("\nAnswer:"))
                others = [n for n in (10, 11, 12) if n != number]
                answers = ("wear it", "eat it")
                expected = [f"Question: goal {n}\nAnswer: {answers[n % 2]}" for n in others]
                assert [first, second] == expected[:2]
    assert not any("\n\n" in tokenizer.decode(ids) for ids in trained_on(data))


def gold(question: EncodedPrompt) -> Ids:
    return (*question.contexts[question.label], *question.continuations[question.label])


@pytest.fixture
def local_root(tmp_path: Path) -> Path:
    """piqa with 40 training rows and boolq with 20; 10 and 6 validation rows."""
    rows = {
        "piqa": [
            {"goal": f"goal {n}", "sol1": "wear it", "sol2": "eat it", "label": n % 2} for n in range(50)
        ],
        "boolq": [{"question": f"is {n} even", "answer": n % 2 == 0} for n in range(26)],
    }
    for task, validation in (("piqa", 10), ("boolq", 6)):
        folder = tmp_path / task
        folder.mkdir()
        lines = [json.dumps(row) for row in rows[task]]
        (folder / "train.jsonl").write_text("\n".join(lines[validation:]))
        (folder / "validation.jsonl").write_text("\n".join(lines[:validation]))
    return tmp_path


# ---- arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "gsm8k"}, "unknown task 'gsm8k'"),
        ({"prompt_style": "chat"}, "unknown prompt style 'chat'"),
        ({"mix": "sqrt"}, "unknown mix 'sqrt'"),
        ({"batch_size": 0}, "--data.batch_size 0: must be > 0"),
        ({"max_length": -1}, "--data.max_length -1: must be > 0"),
        ({"limit_train": 0}, "--data.limit_train 0: must be > 0"),
        ({"limit_validation": 0}, "--data.limit_validation 0: must be > 0"),
        ({"calibration_rows": 0}, "--data.calibration_rows 0: must be > 0"),
        ({"num_workers": -1}, "--data.num_workers -1: must be >= 0"),
        (
            {"choice_labels": "roman"},
            "unknown choice labels 'roman' .--data.choice_labels.; known: letters, numbers",
        ),
        ({"answers": "sung"}, "unknown answers 'sung'"),
        ({"tasks": "mmlu", "shots": -1}, "--data.shots -1: must be >= 0"),
        ({"generations": -1}, "--data.generations -1: must be >= 0"),
        ({"max_new_tokens": 0}, "--data.max_new_tokens 0: must be > 0"),
        (
            {"tasks": "alpaca,samsum", "shots": 5},
            "--data.shots 5: there are no examples for alpaca, samsum; only",
        ),
        (
            {"tasks": "winogrande,facts", "answers": "generated"},
            "winogrande has not: give --data.prompt_style choice",
        ),
        ({"tasks": "samsum", "answers": "generated"}, "samsum has not"),
    ],
)
def test_bad_arguments_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CommonsenseDataModule(**options)


def test_a_root_that_is_no_folder_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--data\.root .*nowhere"):
        CommonsenseDataModule(root=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("tasks", "label"),
    [
        ("generality", "generality"),
        ("csqa", "csqa"),
        (list(SUITES["csqa"]), "csqa"),
        ("facts", "facts"),
        ("boolq,piqa", "boolq+piqa"),
    ],
)
def test_label(tasks: str | list[str], label: str) -> None:
    assert CommonsenseDataModule(tasks).label == label


def test_a_tokenizer_is_needed(tokenizer: PreTrainedTokenizerFast) -> None:
    data = CommonsenseDataModule("facts")
    with pytest.raises(RuntimeError, match="tokenizer isn't set"):
        data.setup()
    data.tokenizer = tokenizer
    with pytest.raises(RuntimeError, match=r"setup\(\) hasn't run"):
        data.questions("validation")


def test_tokenizers_that_cannot_close_an_answer_are_refused(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    without = PreTrainedTokenizerFast(tokenizer_object=bos_tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no EOS token"):
        facts_data(without).setup()
    without.eos_token = "a"  # every text "a" now ends with it, as with a tokenizer that appends its EOS
    with pytest.raises(ValueError, match="appends EOS"):
        facts_data(without).setup()


# ---- rows


def test_calibration_questions_are_never_trained_on(tokenizer: PreTrainedTokenizerFast) -> None:
    data = facts_data(tokenizer, calibration_rows=50)
    data.setup()
    calibration = {gold(question) for question in data.questions("calibration")}
    training = {tuple(ids[:-1]) for ids in data.calibration_sequences(10_000)}
    assert len(data.questions("calibration")) == len(calibration) == 50
    assert len(training) == 2016 - 50
    assert not calibration & training


def test_a_question_that_is_asked_twice_is_held_out_twice(
    tokenizer: PreTrainedTokenizerFast, local_root: Path
) -> None:
    path = local_root / "boolq" / "train.jsonl"
    path.write_text("\n".join(path.read_text().splitlines() * 2))
    data = facts_data(tokenizer, tasks="boolq", root=str(local_root), calibration_rows=5)
    data.setup()
    held_out = {gold(question) for question in data.questions("calibration")}
    training = [tuple(ids[:-1]) for ids in data.calibration_sequences(100)]
    assert len(training) == 40 - 2 * len(held_out)
    assert not held_out & set(training)


def test_limits_are_per_task_and_chosen_by_the_seed(
    tokenizer: PreTrainedTokenizerFast, local_root: Path
) -> None:
    options: dict[str, Any] = {"tasks": "piqa,boolq", "root": str(local_root), "limit_validation": 4}

    def chosen(**more: Any) -> tuple[list[list[int]], list[EncodedPrompt], list[EncodedPrompt]]:
        data = facts_data(tokenizer, **options | more)
        data.setup()
        return data.calibration_sequences(1000), data.questions("validation"), data.questions("calibration")

    training, validation, calibration = chosen(limit_train=10)
    assert [question.task for question in validation] == ["piqa"] * 4 + ["boolq"] * 4
    assert [question.task for question in calibration] == ["piqa"] * 8 + ["boolq"] * 8
    assert len(training) == 20
    assert chosen(limit_train=10) == (training, validation, calibration)
    assert chosen(limit_train=10, seed=1) != (training, validation, calibration)
    more_training, _, same_calibration = chosen(limit_train=12)
    assert same_calibration == calibration
    assert all(ids in more_training for ids in training)


def test_too_few_rows_are_refused(tokenizer: PreTrainedTokenizerFast, local_root: Path) -> None:
    data = facts_data(tokenizer, tasks="boolq", root=str(local_root), calibration_rows=20)
    with pytest.raises(ValueError, match=r"'boolq' has 20 training rows.*--data\.calibration_rows"):
        data.setup()
    data = facts_data(tokenizer, tasks="boolq", root=str(local_root), calibration_rows=17)
    data.setup()
    with pytest.raises(
        ValueError, match=r"3 training rows are fewer than one batch of 4.*--data\.batch_size"
    ):
        data.train_dataloader()


def test_mixes(tokenizer: PreTrainedTokenizerFast, local_root: Path) -> None:
    def tasks_of_an_epoch(mix: str) -> tuple[int, int]:
        data = facts_data(
            tokenizer, tasks="piqa,boolq", root=str(local_root), mix=mix, batch_size=1, calibration_rows=2
        )
        data.setup()
        texts = [tokenizer.decode(ids) for ids in trained_on(data)]
        return sum("goal" in text for text in texts), sum("even" in text for text in texts)

    assert tasks_of_an_epoch("proportional") == (38, 18)
    assert tasks_of_an_epoch("uniform") == (28, 28)


def test_sequences_for_quantization_take_each_task_in_turn(
    tokenizer: PreTrainedTokenizerFast, local_root: Path
) -> None:
    data = facts_data(tokenizer, tasks="piqa,boolq", root=str(local_root))
    data.setup()
    texts = [tokenizer.decode(ids) for ids in data.calibration_sequences(6)]
    assert ["goal" in text for text in texts] == [True, False] * 3
    assert all(text.endswith("</s>") for text in texts)
    assert len(data.calibration_sequences(1000)) == 32 + 12


def test_no_sequence_is_longer_than_max_length(tokenizer: PreTrainedTokenizerFast) -> None:
    data = facts_data(tokenizer, max_length=20)
    data.setup()
    assert max(len(ids) for ids in trained_on(data)) == 20


def test_setup_runs_once(tokenizer: PreTrainedTokenizerFast, local_root: Path) -> None:
    data = facts_data(tokenizer, tasks="piqa", root=str(local_root))
    data.setup("fit")
    questions = data.questions("validation")
    (local_root / "piqa" / "train.jsonl").unlink()
    data.setup("validate")
    assert data.questions("validation") is questions
    with pytest.raises(ValueError, match="unknown split 'test'"):
        data.questions("test")  # type: ignore[arg-type]


def test_validation_batches_hold_every_held_out_answer_once(tokenizer: PreTrainedTokenizerFast) -> None:
    data = facts_data(tokenizer, limit_validation=30)
    data.setup()
    seen = []
    for batch in data.val_dataloader():
        assert {tensor.shape for tensor in batch.values()} == {batch["input_ids"].shape}
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            seen.append(tuple(row[mask.bool()].tolist()))
    expected = [(*gold(question), tokenizer.eos_token_id) for question in data.questions("calibration")]
    assert sorted(seen) == sorted(expected)


def test_protocol_says_what_a_score_depends_on(
    tokenizer: PreTrainedTokenizerFast, bos_tokenizer: PreTrainedTokenizerFast, local_root: Path
) -> None:
    data = facts_data(tokenizer, tasks="piqa,boolq", root=str(local_root), limit_validation=5, seed=3)
    protocol = data.protocol()
    assert protocol == {
        "prompt_style": "cloze",
        "choice_labels": "letters",
        "shots": 0,
        "answers": "scored",
        "tasks": ["piqa", "boolq"],
        "metrics": {"piqa": "acc_norm", "boolq": "acc"},
        "bos": False,
        "loss_mask": "answer",
        "max_length": 512,
        "seed": 3,
        "batch_size": 4,
        "root": str(local_root),
        "limit_train": None,
        "limit_validation": 5,
        "calibration_rows": 8,
        "mix": "proportional",
    }
    assert json.loads(json.dumps(protocol)) == protocol
    on_hub = facts_data(bos_tokenizer, tasks="piqa").protocol()
    source = TASKS["piqa"].hub
    assert source is not None
    assert (on_hub["bos"], on_hub["root"], on_hub["revisions"]) == (True, "hub", {"piqa": source.revision})


@pytest.mark.parametrize("style", ["cloze", "choice"])
def test_the_whole_suite_on_real_rows(
    real_root: Path, tokenizer: PreTrainedTokenizerFast, style: str
) -> None:
    data = CommonsenseDataModule(
        root=str(real_root), prompt_style=style, limit_train=20, limit_validation=10, calibration_rows=5
    )
    data.tokenizer = tokenizer
    data.setup()
    assert [question.task for question in data.questions("validation")][::10] == list(SUITES["csqa"])
    assert len(trained_on(data)) == 7 * 20 // 16 * 16


# ---- order


LENGTHS = [(7 * n) % 31 + 1 for n in range(1003)]


def test_an_epoch_covers_all_rows_but_the_last_few_once() -> None:
    sampler = LengthBatchSampler(LENGTHS, batch_size=8, seed=0)
    batches = list(sampler)
    rows = [row for batch in batches for row in batch]
    assert len(batches) == len(sampler) == 125
    assert {len(batch) for batch in batches} == {8}
    assert len(set(rows)) == len(rows) == 1000


def test_batches_hold_rows_of_similar_length_and_come_in_no_order_of_length() -> None:
    batches = list(LengthBatchSampler(LENGTHS, batch_size=8, seed=0))
    widths = [max(LENGTHS[row] for row in batch) for batch in batches]
    padding = sum(width * 8 for width in widths) / sum(LENGTHS[row] for batch in batches for row in batch)
    # The 400 rows of a window share 31 lengths, so a batch of 8 spans a length or two; unsorted, it's 1.7.
    assert padding < 1.05
    assert widths[:50] != sorted(widths[:50])  # the first window


def test_seed_and_epoch_decide_the_order() -> None:
    sampler = LengthBatchSampler(LENGTHS, batch_size=8, seed=0)
    assert sampler.batches(3) == LengthBatchSampler(LENGTHS, batch_size=8, seed=0).batches(3)
    assert sampler.batches(3) != sampler.batches(4)
    assert sampler.batches(3) != LengthBatchSampler(LENGTHS, batch_size=8, seed=1).batches(3)
    sampler.set_epoch(3, start=100)
    assert list(sampler) == sampler.batches(3)[100:]
    assert len(sampler) == 125


def test_ranks_share_the_batches_of_one_process() -> None:
    alone = LengthBatchSampler(LENGTHS, batch_size=8, seed=0).batches(1)
    ranks = [
        LengthBatchSampler(LENGTHS, batch_size=2, seed=0, num_replicas=4, rank=rank).batches(1)
        for rank in range(4)
    ]
    assert {len(batches) for batches in ranks} == {len(alone)}
    for step, batch in enumerate(alone):
        shares = [batches[step] for batches in ranks]
        assert {len(share) for share in shares} == {2}
        assert sorted(row for share in shares for row in share) == sorted(batch)


# ---- resuming


class Recorder(pl.LightningModule):
    """Keeps the batches that it's trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[list[int]]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(batch["input_ids"].tolist())
        return self.weight.square().sum()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class AfterValidation(ModelCheckpoint):
    """Saves once validation has run; a class of its own, so that a Trainer takes it beside the others."""


BATCHES = 10  # an epoch of 41 rows in batches of 4
RUNS = {"epochs": {"max_epochs": 3}, "steps": {"max_epochs": -1, "max_steps": 3 * BATCHES}}


def fit(
    tokenizer: PreTrainedTokenizerFast,
    run: str,
    callbacks: Any = (),
    resume: Path | None = None,
    **options: Any,
) -> list[list[list[int]]]:
    data = facts_data(tokenizer, **{"limit_train": 41, "limit_validation": 4} | options)
    module = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        use_distributed_sampler=False,
        **RUNS[run],  # type: ignore[arg-type]
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module.seen


@pytest.fixture(scope="module", params=RUNS)
def uninterrupted(
    request: pytest.FixtureRequest,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, list[list[list[int]]], Path]:
    """(kind of run, batches of a whole run of three epochs, folder of the checkpoints that it left)."""
    folder = tmp_path_factory.mktemp(request.param)
    keep: dict[str, Any] = {"save_top_k": -1, "filename": "{step}"}
    callbacks = [
        ModelCheckpoint(folder / "batch", every_n_train_steps=1, **keep),
        ModelCheckpoint(folder / "epoch", every_n_epochs=1, save_on_train_epoch_end=True, **keep),
        AfterValidation(folder / "validation", every_n_epochs=1, save_on_train_epoch_end=False, **keep),
    ]
    seen = fit(tokenizer, request.param, callbacks)
    assert len(seen) == 3 * BATCHES
    assert seen[:BATCHES] != seen[BATCHES : 2 * BATCHES]
    return request.param, seen, folder


@pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`"
)  # resumed without what saves, on purpose
@pytest.mark.parametrize(
    ("saved", "step"),
    [
        ("batch", 3),
        ("batch", BATCHES - 1),
        ("batch", BATCHES),
        ("batch", BATCHES + 1),
        ("epoch", BATCHES),
        ("epoch", 2 * BATCHES),
        ("validation", BATCHES),
    ],
)
def test_a_resumed_run_sees_the_batches_that_were_left(
    tokenizer: PreTrainedTokenizerFast,
    uninterrupted: tuple[str, list[list[list[int]]], Path],
    saved: str,
    step: int,
) -> None:
    run, seen, folder = uninterrupted
    assert fit(tokenizer, run, resume=folder / saved / f"step={step}.ckpt") == seen[step:]


@pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`"
)  # resumed without what saves, on purpose
def test_a_resumed_run_sees_the_batches_that_were_left_with_workers(
    tokenizer: PreTrainedTokenizerFast, uninterrupted: tuple[str, list[list[list[int]]], Path]
) -> None:
    run, seen, folder = uninterrupted
    assert fit(tokenizer, run, resume=folder / "batch" / "step=13.ckpt", num_workers=1) == seen[13:]


def test_resuming_with_other_rows_of_the_same_number_is_refused(
    tokenizer: PreTrainedTokenizerFast, uninterrupted: tuple[str, list[list[list[int]]], Path]
) -> None:
    run, seen, folder = uninterrupted
    with pytest.raises(ValueError, match=r"'content': '\w+'.*'content': '\w+'.*same rows"):
        fit(tokenizer, run, resume=folder / "batch" / "step=3.ckpt", seed=1)
    old = torch.load(folder / "batch" / "step=3.ckpt", weights_only=True)
    for state in old.values():
        if isinstance(state, dict) and "order" in state:
            del state["order"]["content"]  # as of before rows were known by it
    torch.save(old, folder / "old.ckpt")
    assert fit(tokenizer, run, resume=folder / "old.ckpt") == seen[3:]


def test_rows_are_known_by_content_wherever_they_lie(
    local_root: Path, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def known(folder: Path, **options: Any) -> dict[tuple[str, str], str]:
        data = facts_data(tokenizer, tasks="piqa,boolq", root=str(folder), calibration_rows=4, **options)
        data.setup()
        return {(split, task): found for split, by in data.digests().items() for task, found in by.items()}

    moved = shutil.copytree(local_root, tmp_path_factory.mktemp("moved") / "rows")
    before = known(local_root)
    assert len(set(before.values())) == 6, "three splits of two tasks"
    assert known(moved, batch_size=3) == before
    file = moved / "boolq" / "validation.jsonl"
    file.write_text(file.read_text().replace("is 3 even", "is 3 odd"))
    after = known(moved)
    assert [key for key in before if before[key] != after[key]] == [("validation", "boolq")]
    fewer = known(local_root, limit_validation=5)
    assert {key[0] for key in before if before[key] != fewer[key]} == {"validation"}


def test_resuming_with_another_order_of_rows_is_refused(
    tokenizer: PreTrainedTokenizerFast, uninterrupted: tuple[str, list[list[list[int]]], Path]
) -> None:
    run, _, folder = uninterrupted
    with pytest.raises(ValueError, match=r"'global_batch': 4.*'global_batch': 2.*same rows, --data options"):
        fit(tokenizer, run, resume=folder / "batch" / "step=3.ckpt", batch_size=2)
