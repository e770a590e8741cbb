"""A family from a file of its own goes the whole way, from training to the report and back into transformers."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from qtale_lightning.__main__ import main
from qtale_lightning.architectures import ARCHITECTURES, Architecture, KnownModel, register
from qtale_lightning.architectures.base import sizes
from qtale_lightning.results.store import load_results

pytestmark = pytest.mark.slow


@pytest.fixture
def family() -> Iterator[Architecture]:
    """IBM's Granite: LLaMA's modules, and multipliers of embeddings, attention, residuals and logits."""
    shape = sizes(768, 128, 256, 3, 4, 2, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    made = Architecture(
        model_type="granite",
        causal_lm="GraniteForCausalLM",
        fused=False,
        models={"tiny-granite": KnownModel(shape | {"residual_multiplier": 0.5, "logits_scaling": 2.0})},
    )
    yield register(made)
    del ARCHITECTURES[made.model_type]


def test_a_family_is_one_declaration(
    family: Architecture, options: Callable[..., list[str]], tmp_path: Path
) -> None:
    more = ["--model.name", "tiny-granite", "--out", str(tmp_path), "--wandb", "disabled"]
    more += ["--data.batch_size", "8", "--data.limit_train", "64", "--data.limit_validation", "16"]
    more += ["--data.calibration_rows", "8", "--trainer.max_steps", "4", "--validations", "1"]
    more += ["--quantize.bits", "[4,3]", "--quantize.sequences", "32", "--sweep.thresholds", "[0.5]"]
    main(["fit", *options("tiny", "qtale", *more)])
    root = tmp_path / "tiny-granite-qtale-facts-s0"
    rows = [row for row in load_results(root)["evaluation"] if row["split"] == "validation"]
    assert {(row["bits"], row["theta"]) for row in rows} == {(16, 0.5), (4, 0.5), (3, 0.5)}
    loaded = AutoModelForCausalLM.from_pretrained(root / "model")
    assert type(loaded).__name__ == "RoutedGraniteForCausalLM"
    assert loaded.config.residual_multiplier == 0.5
