"""A method from a file of its own goes the whole way, from training to the report."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qtale_lightning.__main__ import main
from qtale_lightning.results.store import load_results
from qtale_lightning.routing import METHODS, Method, register
from qtale_lightning.routing.method import Pass
from qtale_lightning.tables.declaration import Cell

pytestmark = pytest.mark.slow


class EveryOther(Method):
    """Tokens at odd positions execute the first layers that may be skipped, those at even ones all."""

    name = "every-other"
    title = "every other token"
    decides = True

    def decide(self, routing: Pass, layer: int) -> Tensor:
        return (routing.places % 2 == 0) | torch.tensor(layer < 4)


@pytest.fixture
def toy() -> Iterator[Method]:
    register(method := EveryOther())
    yield method
    del METHODS[method.name]


def test_a_method_is_one_declaration(toy: Method, options: Callable[..., list[str]], tmp_path: Path) -> None:
    more = ["--model.method", toy.name, "--model.lambda_ratio", "0", "--out", str(tmp_path)]
    more += ["--data.batch_size", "8", "--data.limit_train", "64", "--data.limit_validation", "16"]
    more += [
        "--data.calibration_rows",
        "8",
        "--trainer.max_steps",
        "4",
        "--validations",
        "1",
        "--wandb",
        "disabled",
    ]
    more += ["--quantize.bits", "[4]", "--quantize.sequences", "32"]
    main(["fit", *options("tiny", "full", *more)])
    root = tmp_path / "tiny-every-other-facts-s0"
    results = load_results(root)
    rows = [row for row in results["evaluation"] if row["split"] == "validation"]
    assert {(row["bits"], row["theta"]) for row in rows} == {(16, None), (4, None)}
    for row in rows:
        ratios = row["execution_ratio_per_layer"]
        assert ratios[:4] == [1.0] * 4
        assert all(0.4 < ratio < 0.7 for ratio in ratios[4:])
    assert len(results["routing"]["execution_ratio_per_layer"]) == 6
    assert "every-other" in (root / "model" / "README.md").read_text(encoding="utf-8")
    assert (root / "results.md").is_file()
    assert Cell(name="a", method=toy.name).theta is None
    with pytest.raises(ValueError, match="has no θ"):
        Cell(name="a", method=toy.name, theta=0.5)
