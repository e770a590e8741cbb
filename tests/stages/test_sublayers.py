"""The stages of a run whose routers decide about attention and MLP apart: what they measure, keep and show."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qtale_lightning.__main__ import main
from qtale_lightning.evaluation import cost
from qtale_lightning.models.config import RoutedConfig
from qtale_lightning.results.store import load_results
from qtale_lightning.run import RunDirectory
from qtale_lightning.stages.export import load_exported

SMALL = ("--data.limit_validation", "40", "--data.limit_train", "64", "--data.calibration_rows", "24")
MORE = ("--quantize.engine", "rtn", "--quantize.bits", "[4]", "--model.gates", "sublayer")


@pytest.mark.slow
def test_a_run_is_swept_shown_and_refused_what_it_cannot_have(
    make_run: Callable[..., RunDirectory],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qtale_lightning.report.write_report", lambda run: None)
    run = make_run(tmp_path, "qtale", *SMALL, *MORE)
    config: RoutedConfig = load_exported(run).config
    (attention, mlp), layers = config.unit_shares, config.num_hidden_layers
    assert (attention, mlp) == pytest.approx((1 / 3, 2 / 3))  # tiny: 3 · 128² and 6 · 128² weights

    main(["thresholds", str(run.root), "--sweep.rule", "budget", "--sweep.budgets", "[0.7]"])
    results = load_results(run.root)
    assert [(one["bits"], one["budget"]) for one in results["selected"]] == [(16, 0.7), (4, 0.7)]
    for row in results["evaluation"]:
        apart = row["execution_ratio_per_sublayer"]
        weighed = [attention * a + mlp * m for a, m in zip(apart[::2], apart[1::2], strict=True)]
        assert row["execution_ratio_per_layer"] == pytest.approx(weighed, abs=1e-6)  # float32
        assert row["execution_ratio"] == pytest.approx(sum(weighed) / layers, abs=1e-6)
        if row["split"] == "calibration":
            assert row["execution_ratio"] == pytest.approx(0.7, abs=0.005)
        # The FLOPs are those of the weights, but for keys met, the second router, and a head for one token in some.
        assert abs(row["flops_ratio"] - cost.flops_ratio(config, apart, 20)) < 0.01
        assert any(abs(a - m) > 0.01 for a, m in zip(apart[::2], apart[1::2], strict=True))

    main(["inspect", str(run.root), "--questions", "5"])
    content = json.loads((run.root / "inspect" / "theta-0.5.json").read_text(encoding="utf-8"))
    assert content["shares"] == [attention, mlp]
    assert {len(t) for text in content["texts"] for t in text["traces"][0]["executed"]} == {2 * (layers - 2)}
    (same, four) = load_results(run.root)["changes"]
    assert same["decisions_changed"] == 0 < four["decisions_changed"]
    assert len(four["changed_per_layer"]) == layers
    assert same["nll"] == same["nll_same_decisions"]

    with pytest.raises(SystemExit):
        main(["quantize", str(run.root), "--quantize.bits", "[3]", "--quantize.refit_routers", "true"])
    assert "fits routers that decide about layers" in " ".join(capsys.readouterr().err.split())
    assert not run.model(3, "rtn").exists()
