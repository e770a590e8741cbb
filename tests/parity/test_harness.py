"""Scoring against lm-evaluation-harness, unmodified, through its Hugging Face backend, item by item, in float32.

The harness pads on the right, gives no attention mask, and computes every choice with its whole prompt; we compute a
prompt once, with its choices as branches. So log-likelihoods differ by rounding: by ~1e-5 for short answers, and by a
few units in the last place of the harness's float32 sum for one of -200. The tolerance is 1e-4, and 1e-6 of the sum; a
wrong token, boundary or routing decision moves it by 1e-1 or more. Where the two best choices are closer than 1e-4 (a
tie), either may win; ties are counted and must be few.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tokenizers import processors
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from qtale_lightning.data import Prompt, build_prompt, encode_prompt, read_local
from qtale_lightning.evaluation.accuracy import accuracy_by_task
from qtale_lightning.evaluation.scoring import score
from qtale_lightning.harness import evaluate_tasks, find_tasks, harness_model, write_tasks
from qtale_lightning.models import RoutedForCausalLM, route
from qtale_lightning.models.sources import load_base, load_tokenizer
from qtale_lightning.tasks import SUITES, TASKS
from tests.llama import llama_config

lm_eval = pytest.importorskip("lm_eval", reason="needs requirements-lm-eval.txt")

TOLERANCE = {"rtol": 1e-6, "atol": 1e-4}
TIE = 1e-4
CSQA = SUITES["csqa"]
WORDS = [
    "the",
    "a",
    "is",
    "iron",
    "wool",
    "water",
    "sheep",
    "–",
    "naïve,",
    "Kim's",
    "(hot)",
    "1,000",
    "cold?",
]

# Where the harness declares the tasks, in `lm_eval/tasks`.
DECLARED = {
    "piqa": "piqa/piqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "social_iqa": "siqa/siqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "winogrande": "winogrande/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}

Prompts = dict[str, list[Prompt]]


# ------------------------------------------------------------------------------------------------ rows and models


def made_rows(task: str, count: int = 8) -> list[dict[str, Any]]:
    """Random rows in the fields of a task's dataset; texts of ragged lengths, as many choices as the task may have."""
    random = Random(task)

    def text(low: int, high: int) -> str:
        return " ".join(random.choices(WORDS, k=random.randint(low, high)))

    def row(number: int) -> dict[str, Any]:
        if task == "piqa":
            return {"goal": text(3, 9), "sol1": text(1, 12), "sol2": text(1, 12), "label": number % 2}
        if task == "boolq":
            return {"passage": text(5, 20), "question": f"{text(2, 5)} it", "answer": bool(number % 2)}
        if task == "social_iqa":
            answers = {f"answer{letter}": text(1, 5) for letter in "ABC"}
            return {"context": text(3, 9), "question": text(2, 4), **answers, "label": str(1 + number % 3)}
        if task == "winogrande":
            sentence = f"{text(2, 6)} _ {text(1, 6)}"
            return {
                "sentence": sentence,
                "option1": text(1, 2),
                "option2": text(1, 2),
                "answer": str(1 + number % 2),
            }
        count = 4 if task == "openbookqa" else (3, 4, 5, 4)[number % 4]
        labels = list("ABCDE" if number % 2 else "12345")[:count]
        choices = {"text": [text(1, 6) for _ in range(count)], "label": labels}
        asked = "question_stem" if task == "openbookqa" else "question"
        stem = (
            "a" if task == "openbookqa" and number == 0 else text(2, 9)
        )  # one token: fewer than are reserved
        return {asked: stem, "choices": choices, "answerKey": labels[number % count]}

    return [row(number) for number in range(count)]


@pytest.fixture(scope="module")
def made() -> Prompts:
    """Prompts of made rows of all seven tasks."""
    return {task: [build_prompt(TASKS[task].parse(row), "cloze") for row in made_rows(task)] for task in CSQA}


@pytest.fixture(scope="module", params=["no BOS", "BOS"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """The tiny model's, as it is and with a BOS before every text."""
    made = load_tokenizer("tiny")
    bos = made.bos_token
    template = processors.TemplateProcessing(
        single=f"{bos} $A" if request.param == "BOS" else "$A", special_tokens=[(bos, made.bos_token_id)]
    )
    made.backend_tokenizer.post_processor = template
    assert (made("a")["input_ids"][0] == made.bos_token_id) == (request.param == "BOS")
    return made


def with_routers(dense: LlamaForCausalLM, gain: float) -> RoutedForCausalLM:
    """The same weights with random routers; a larger gain for smaller hidden states, so that decisions are mixed."""
    config = dense.config.to_dict() | {"model_type": "routed_llama", "router_width": 16, "start_layer": 2}
    torch.manual_seed(1)
    model = route(copy.deepcopy(dense), llama_config(**config))
    for layer in model.model.layers[2:]:
        nn.init.normal_(layer.router.out.weight, 0.0, gain)
        nn.init.zeros_(layer.router.out.bias)
    return model.eval()


def without_routers(dense: LlamaForCausalLM) -> RoutedForCausalLM:
    """The same weights as a routed model that has no router."""
    config = dense.config.to_dict() | {
        "model_type": "routed_llama",
        "start_layer": dense.config.num_hidden_layers,
    }
    return route(copy.deepcopy(dense), llama_config(**config)).eval()


@pytest.fixture(scope="module")
def dense() -> LlamaForCausalLM:
    """Hugging Face's LLaMA with weights large enough for answers that differ."""
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 5, "head_dim": 8}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=768, initializer_range=0.2, **shape, **heads)).eval()


@pytest.fixture(scope="module")
def routed(dense: LlamaForCausalLM) -> RoutedForCausalLM:
    return with_routers(dense, 2.0)


# ------------------------------------------------------------------------------------------------ comparing


def by_harness(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, folder: Path, batch_size: int = 5
) -> dict[str, Any]:
    """The harness's answer on task files of the prompts."""
    names = write_tasks(folder, prompts)
    lm = harness_model(model, tokenizer, batch_size)
    return evaluate_tasks(lm, names, find_tasks(names, folder, defaults=False))


def assert_equal(
    model: RoutedForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    found: dict[str, Any],
    most_ties: float = 0.0,
    **how: Any,
) -> None:
    """Our scores are the harness's: every log-likelihood, every prediction that isn't a tie, every accuracy."""
    for task, asked in prompts.items():
        encoded = [encode_prompt(tokenizer, prompt, 512) for prompt in asked]
        samples = sorted(found["samples"][f"{task}_local"], key=lambda sample: sample["doc_id"])
        ours = score(model, encoded, **how).loglikelihoods
        theirs = [np.array([answer for answer, _ in sample["filtered_resps"]]) for sample in samples]
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, **TOLERANCE)
        for metric in ("acc",) if task == "winogrande" else ("acc", "acc_norm"):
            lengths = [np.array(p.choice_lengths if metric == "acc_norm" else 1.0) for p in asked]
            best = [
                [int((s / n).argmax()) for s, n in zip(scores, lengths, strict=True)]
                for scores in (ours, theirs)
            ]
            assert [p.label == b for p, b in zip(asked, best[1], strict=True)] == [s[metric] for s in samples]
            tied = [
                i for i, (s, n) in enumerate(zip(theirs, lengths, strict=True)) if gap_of_best(s / n) < TIE
            ]
            assert len(tied) <= most_ties * len(asked)
            differing = [i for i, (one, other) in enumerate(zip(*best, strict=True)) if one != other]
            assert set(differing) <= set(tied)
            if not tied:
                accuracy = accuracy_by_task(encoded, ours, {task: metric})[task]["value"]
                assert accuracy == pytest.approx(found["results"][f"{task}_local"][f"{metric},none"])


def gap_of_best(scores: np.ndarray) -> float:
    """By how much the best choice is better than the next."""
    next_best, best = np.sort(scores)[-2:]
    return float(best - next_best)


# ------------------------------------------------------------------------------------------------ made rows


@pytest.mark.parametrize("shots", [0, 3])
def test_prompts_are_those_of_the_harness(shots: int, tmp_path: Path) -> None:
    """The harness's own task files, with nothing replaced but where the rows come from, ask the same.

    With examples, its sampler `first_n` takes the first training rows.
    """
    made = {}
    tasks_folder = Path(lm_eval.__file__).parent / "tasks"
    for task, file in DECLARED.items():
        rows = made_rows(task, 20)
        parsed = [TASKS[task].parse(row) for row in rows]
        made[task] = [build_prompt(question, "cloze", shots=parsed[8 : 8 + shots]) for question in parsed[:8]]
        files = {}
        for split, some in (("validation", rows[:8]), ("train", rows[8:])):
            # Of SuperGLUE's copy of boolq, which the harness reads.
            as_read = [{**row, "label": int(row["answer"])} if task == "boolq" else row for row in some]
            (tmp_path / task).mkdir(exist_ok=True)
            path = tmp_path / task / f"{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in as_read), encoding="utf-8")
            files[split] = str(path)
        source = {"data_files": files, "cache_dir": str(tmp_path / "cache")}
        changed = {"include": str(tasks_folder / file), "task": task, "test_split": None}
        changed |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": source}
        changed |= {"num_fewshot": shots, "fewshot_split": "train", "fewshot_config": {"sampler": "first_n"}}
        (tmp_path / f"{task}.yaml").write_text(yaml.safe_dump(changed), encoding="utf-8")
    loaded = find_tasks(list(DECLARED), tmp_path, defaults=False).load(list(DECLARED))["tasks"]
    for task, prompts in made.items():
        loaded[task].build_all_requests()
        asked = [request.args for request in loaded[task].instances]
        assert asked == [pair for p in prompts for pair in zip(p.contexts, p.continuations, strict=True)]
        gold = loaded[task].doc_to_text if task == "winogrande" else loaded[task].doc_to_target
        assert [gold(doc) for doc in loaded[task].validation_docs()] == [p.label for p in prompts]


def test_task_files_ask_the_prompts(made: Prompts, tmp_path: Path) -> None:
    names = write_tasks(tmp_path, made)
    loaded = find_tasks(names, tmp_path, defaults=False).load(names)["tasks"]
    for task, prompts in made.items():
        declared = loaded[f"{task}_local"]
        declared.build_all_requests()
        asked = [request.args for request in declared.instances]
        assert asked == [pair for p in prompts for pair in zip(p.contexts, p.continuations, strict=True)]


@pytest.mark.slow
def test_dense_scores_are_the_harness_s(
    dense: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, made: Prompts, tmp_path: Path
) -> None:
    found = by_harness(dense, tokenizer, made, tmp_path)
    assert_equal(without_routers(dense), tokenizer, made, found)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 5])
def test_routed_scores_are_the_harness_s(
    routed: RoutedForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    made: Prompts,
    tmp_path: Path,
    batch_size: int,
) -> None:
    """The harness calls the routed model as any other: no mask, so its padding is computed, but comes last."""
    found = by_harness(routed, tokenizer, made, tmp_path, batch_size)
    assert_equal(routed, tokenizer, made, found)


def test_decisions_are_mixed(
    routed: RoutedForCausalLM, tokenizer: PreTrainedTokenizerBase, made: Prompts
) -> None:
    """Or the comparisons above would compare dense models."""
    encoded = [encode_prompt(tokenizer, prompt, 512) for asked in made.values() for prompt in asked]
    execution = score(routed, encoded).execution
    assert execution[:2] == [1.0, 1.0]
    assert all(0.1 < share < 0.9 for share in execution[2:]), execution


@pytest.mark.slow
def test_a_threshold_in_the_configuration_is_the_harness_s(
    routed: RoutedForCausalLM, tokenizer: PreTrainedTokenizerBase, made: Prompts, tmp_path: Path
) -> None:
    model = copy.deepcopy(routed)
    model.config.threshold = 0.3
    some = {task: made[task] for task in ("arc_easy", "winogrande")}
    found = by_harness(model, tokenizer, some, tmp_path)
    assert_equal(routed, tokenizer, some, found, threshold=0.3)
    with pytest.raises(AssertionError):
        assert_equal(routed, tokenizer, some, found, threshold=0.5)


def test_batches_change_no_prediction(
    routed: RoutedForCausalLM, tokenizer: PreTrainedTokenizerBase, made: Prompts
) -> None:
    """One question a batch, a few, all in one; in another order, which makes other batches, too."""
    encoded = [encode_prompt(tokenizer, prompt, 512) for asked in made.values() for prompt in asked]
    reference = score(routed, encoded, batch_tokens=1).loglikelihoods
    order = Random(0).sample(range(len(encoded)), len(encoded))
    for batch_tokens in (97, 512, 10**6):
        scores = score(routed, [encoded[i] for i in order], batch_tokens=batch_tokens).loglikelihoods
        for index, found in zip(order, scores, strict=True):
            np.testing.assert_allclose(found, reference[index], **TOLERANCE)
            assert found.argmax() == reference[index].argmax()


def test_generation_pads_on_the_left(
    routed: RoutedForCausalLM, tokenizer: PreTrainedTokenizerBase, made: Prompts
) -> None:
    """Prompts of different lengths in one batch are continued as each alone, and as `generate` does."""
    from lm_eval.api.instance import Instance

    contexts = [prompt.contexts[0] for prompt in made["social_iqa"][:4]]
    assert len({len(tokenizer(context)["input_ids"]) for context in contexts}) > 1
    options = {"until": [], "max_gen_toks": 6, "do_sample": False}

    def generated(batch_size: int) -> Sequence[str]:
        lm = harness_model(routed, tokenizer, batch_size)
        requests = [Instance("generate_until", {}, (context, dict(options)), 0) for context in contexts]
        return lm.generate_until(requests, disable_tqdm=True)

    together = generated(4)
    assert together == generated(1)
    for context, text in zip(contexts, together, strict=True):
        ids = tokenizer(context, return_tensors="pt")
        whole = routed.generate(**ids, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        new = whole[0, ids["input_ids"].shape[1] :]
        assert tokenizer.decode(new, skip_special_tokens=True) == text


# ------------------------------------------------------------------------------------------------ real rows


@pytest.fixture(scope="module")
def real_rows(real_root: Path) -> Prompts:
    """Ten real rows of each task, the shortest of sixty: this is the file's longest test."""
    found = {}
    for task in CSQA:
        prompts = [
            build_prompt(question, "cloze")
            for question in read_local(task, str(real_root), "validation")[:60]
        ]
        found[task] = sorted(
            prompts, key=lambda prompt: len("".join(prompt.contexts + prompt.continuations))
        )[:10]
    return found


@pytest.fixture(scope="module")
def smollm2() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    try:
        return load_base("smollm2-135m").eval(), load_tokenizer("smollm2-135m")
    except OSError as error:
        pytest.skip(f"needs SmolLM2's weights: {error}")


@pytest.mark.slow
def test_real_rows(
    real_rows: Prompts, smollm2: tuple[LlamaForCausalLM, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    dense, tokenizer = smollm2
    found = by_harness(dense, tokenizer, real_rows, tmp_path, 8)
    assert_equal(without_routers(dense), tokenizer, real_rows, found, most_ties=0.1)


@pytest.mark.slow
def test_real_rows_routed(
    real_rows: Prompts, smollm2: tuple[LlamaForCausalLM, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    """Few rows: of many thousand decisions one may lie so near θ that noise turns it, and moves what follows."""
    dense, tokenizer = smollm2
    model = with_routers(dense, 1.0)
    some = {task: real_rows[task][:4] for task in ("arc_easy", "winogrande")}
    found = by_harness(model, tokenizer, some, tmp_path, 8)
    assert_equal(model, tokenizer, some, found, most_ties=0.05)
    encoded = [encode_prompt(tokenizer, prompt, 512) for asked in some.values() for prompt in asked]
    assert 0.2 < float(np.mean(score(model, encoded).execution[2:])) < 0.8
