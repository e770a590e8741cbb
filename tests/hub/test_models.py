"""A model of the hub is one commit for a whole run: configuration, tokenizer, training and export."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from qtale_lightning.architectures import known_models
from qtale_lightning.cli import QTALECLI
from qtale_lightning.hub.download import resolve
from qtale_lightning.hub.errors import HubError
from qtale_lightning.models.sources import (
    ModelUnavailableError,
    check_source,
    find_commit,
    load_base,
    load_tokenizer,
    source_name,
)
from qtale_lightning.module import QTALEModule
from tests.conftest import Options
from tests.hub.conftest import FIRST, SECOND, LoopbackHub

Files = Callable[[int], dict[str, bytes]]
NAME = "someone/tiny"


def head(module: QTALEModule) -> torch.Tensor:
    return module.model.lm_head.weight


def test_every_preset_of_the_hub_has_a_commit() -> None:
    loose = [
        name for name, (_, model) in known_models().items() if model.hub and len(model.revision or "") != 40
    ]
    assert loose == []


def test_training_and_export_read_one_commit(hub: LoopbackHub, tiny_files: Files) -> None:
    """Export merges into what was trained on, although its main moved meanwhile, and asks nobody for it."""
    hub.publish(NAME, tiny_files(1))
    module = QTALEModule(name="tiny", path=NAME, method="full", lambda_ratio=0.0, lambda_entropy=0.0)
    module.configure_model()
    hub.publish(NAME, tiny_files(2), SECOND)
    hub.requests.clear()
    resolve.cache_clear()
    fresh = module.fresh()
    fresh.configure_model()
    assert (module.revision, fresh.revision) == (FIRST, FIRST)
    assert torch.equal(head(fresh), head(module))
    assert fresh.tokenizer.get_vocab() == load_tokenizer("tiny").get_vocab()
    assert not [request for request in hub.requests if SECOND in request or "main" in request]
    assert source_name("tiny", NAME, fresh.revision) == f"{NAME} at {FIRST}"


def test_a_revision_can_be_chosen(hub: LoopbackHub, tiny_files: Files) -> None:
    hub.publish(NAME, tiny_files(1))
    hub.publish(NAME, tiny_files(2), SECOND)
    name = "lm_head.weight"
    for revision, seed in ((FIRST, 1), (SECOND, 2), ("main", 2), (None, 2)):
        loaded = load_base("tiny", NAME, revision=revision).state_dict()[name]
        assert torch.equal(loaded, load_base("tiny", seed=seed).state_dict()[name]), revision
    with pytest.raises(HubError, match=r"no revision 'nope' \(--model.revision\)"):
        find_commit("tiny", NAME, "nope")


def test_a_model_is_checked_before_its_weights_are_downloaded(hub: LoopbackHub, tiny_files: Files) -> None:
    hub.publish(NAME, tiny_files(1))
    with pytest.raises(ValueError, match=f"{NAME} at main .--model.path. isn't a smollm2-135m"):
        check_source("smollm2-135m", NAME)
    check_source("tiny", NAME)
    assert not [request for request in hub.requests if "safetensors" in request]


def test_pickled_weights_stay_on_the_hub(hub: LoopbackHub, tiny_files: Files) -> None:
    files = {name: data for name, data in tiny_files(1).items() if not name.endswith(".safetensors")}
    hub.publish(NAME, files | {"pytorch_model.bin": b"pickle", "model.bf16.safetensors": b"once more"})
    with pytest.raises(ModelUnavailableError, match="no weights in the safetensors format"):
        load_base("tiny", NAME)
    assert not [request for request in hub.requests if ".bin" in request or "bf16" in request]


def test_a_damaged_download_is_named(hub: LoopbackHub, tiny_files: Files) -> None:
    hub.publish(NAME, tiny_files(1) | {"model.safetensors": b"not weights"})
    with pytest.raises(
        ModelUnavailableError, match=f"the model of {NAME} at main can't be loaded"
    ) as refusal:
        load_base("tiny", NAME)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("where", [None, "."])
def test_only_the_hub_has_revisions(where: str | None) -> None:
    with pytest.raises(ValueError, match=r"--model.revision main: .*leave it out"):
        find_commit("tiny", where, "main")


def parse(options: Options, out: Path, *more: str) -> QTALECLI:
    cli = QTALECLI(options("tiny", "qtale", "--out", str(out), "--model.path", NAME, *more), "test")
    cli.pin_base()
    return cli


def test_the_configuration_records_the_commit_and_a_begun_run_keeps_it(
    hub: LoopbackHub, tiny_files: Files, options: Options, tmp_path: Path
) -> None:
    hub.publish(NAME, tiny_files(1))
    cli = parse(options, tmp_path)
    assert yaml.safe_load(cli.config_text())["model"]["revision"] == FIRST
    cli.run.claim(cli.config_text())
    hub.publish(NAME, tiny_files(2), SECOND)
    resolve.cache_clear()
    again = parse(options, tmp_path)
    again.run.claim(again.config_text())
    assert again.model.revision == FIRST
    other = parse(options, tmp_path, "--model.revision", SECOND)
    with pytest.raises(ValueError, match=f"model.revision is {FIRST} there, {SECOND} here"):
        other.run.claim(other.config_text())
    assert parse(options, tmp_path / "elsewhere").model.revision == SECOND
