"""The benchmark of quantization engines in parts: what has been measured is kept, and not measured again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SETTINGS = {"model": "tiny", "steps": 5}


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def row(engine: str, bits: float, number: int, **more: Any) -> dict[str, Any]:
    return {
        "bits": bits,
        "engine": engine,
        "set": number,
        "search s": 1.0,
        "search CPU s": 1.0,
        "KL": 1.0,
    } | more


def entry(
    run: Callable[[], Any], engine: str = "native", bits: float = 4, number: int = 0, **more: Any
) -> Any:
    from quantizers.entries import Entry

    return Entry(engine, (bits,), number, run, **more)


def test_what_has_ended_is_not_repeated(tmp_path: Path) -> None:
    """A call that is cut off in its second search leaves the first one's rows; the next one begins with the second."""
    from quantizers.record import Record
    from quantizers.running import measure

    target, ran = tmp_path / "rows.json", list[str]()

    def searching(engine: str) -> Any:
        def run() -> list[dict[str, Any]]:
            ran.append(engine)
            if ran == ["native", "gptq"]:
                raise KeyboardInterrupt
            return [row(engine, 4, 0), *([row("native, norm kept", 4, 0)] if engine == "native" else [])]

        return run

    asked = [
        entry(searching("native"), also=("native, norm kept",)),
        entry(searching("gptq"), "gptq"),
        entry(searching("rtn"), "rtn"),
    ]
    with pytest.raises(KeyboardInterrupt):
        measure(asked, Record("quantize", target, SETTINGS), None)
    there = json.loads(target.read_text(encoding="utf-8"))["rows"]
    assert [one["engine"] for one in there] == ["native", "native, norm kept"]
    assert measure(asked, Record("quantize", target, SETTINGS), None) == 0
    assert ran == ["native", "gptq", "gptq", "rtn"]
    assert measure(asked, Record("quantize", target, SETTINGS), None) == 0
    assert len(ran) == 4


def test_nothing_is_begun_that_would_end_too_late(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """auto-round takes about eleven times native's seconds where nothing else is known, and half of that at half the
    steps."""
    from quantizers.record import Record
    from quantizers.running import measure

    record = Record("quantize", tmp_path / "rows.json", SETTINGS)
    record.add([row("native", 4, 0, **{"search s": 60.0})])
    late = entry(pytest.fail, "auto-round", steps=100)
    assert measure([late, late], record, minutes=5) == 2
    assert "would take about 6 of the 5 minutes" in capsys.readouterr().out
    asked = [entry(lambda: [row("auto-round", 4, 0)], "auto-round", steps=100)]
    assert measure(asked, record, minutes=6) == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"benchmark": "planes", "rows": []}, "no measurements of quantize"),
        (
            {"benchmark": "quantize", "rows": [row("rtn", 4, 0)], "claims": []},
            "says nothing of its rows' settings",
        ),
        (
            {"benchmark": "quantize", "rows": [row("rtn", 4, 0, settings={"model": "tiny", "steps": 50})]},
            "steps 50 instead of 5",
        ),
    ],
)
def test_a_file_of_other_measurements_is_refused(tmp_path: Path, content: dict[str, Any], said: str) -> None:
    from quantizers.record import Record

    target = tmp_path / "rows.json"
    target.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        Record("quantize", target, SETTINGS)


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("native", True),
        ("native:3", True),
        ("native:3:1", True),
        ("*:3", True),
        ("native:4", False),
        ("nat", False),
    ],
)
def test_searches_are_chosen_by_patterns(pattern: str, fits: bool) -> None:
    assert entry(list, bits=3, number=1).chosen(["rtn", pattern]) == fits
    assert entry(list, bits=3, number=1).chosen([])


def test_ratios_are_of_the_same_sets() -> None:
    """signround on sets 0 and 1, auto-round on 1 and 2: one ratio, of set 1. Seconds are the processor's."""
    from quantizers.claims import claims

    rows = [row("signround", 3, n, KL=kl) for n, kl in enumerate((0.5, 0.3))]
    rows += [row("auto-round", 3, n, KL=kl, **{"search CPU s": 4.5}) for n, kl in ((1, 0.6), (2, 0.1))]
    rows += [row("native", 3, n, KL=kl) for n, kl in enumerate((1.0, 1.0))]
    made = {one["claim"]: one for one in claims(rows, [], [3])}
    assert made["KL, signround over auto-round, 3 bits, one set"]["value"] == 0.5
    assert made["search CPU s, auto-round over signround, 3 bits, one set"]["value"] == 4.5
    over_native = made["KL, signround over native, 3 bits, mean of 2 sets (± 0.10)"]
    assert over_native["value"] == pytest.approx(0.4)
    assert over_native["met"]
    assert len(made) == 3


def test_fewer_steps_are_held_to_the_same_goals() -> None:
    from quantizers.claims import claims

    rows = [row("signround, 50 steps", 3, 0, KL=0.4, **{"search CPU s": 2.0})]
    rows += [row("auto-round", 3, 0, KL=0.5, **{"search CPU s": 7.0}), row("native", 3, 0)]
    made = {one["claim"]: (one["value"], one["met"]) for one in claims(rows, [], [3])}
    assert made == {
        "KL, signround, 50 steps over native, 3 bits, one set": (0.4, True),
        "search CPU s, auto-round over signround, 50 steps, 3 bits, one set": (3.5, True),
        "KL, signround, 50 steps over auto-round, 3 bits, one set": (0.8, True),
    }
