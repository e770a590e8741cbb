"""Stand-ins: the closed form against least squares, what it predicts of a real layer, and where they are kept."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtale_lightning.models.routing import Routing
from qtale_lightning.module import QTALEModule
from qtale_lightning.routing import Rows
from qtale_lightning.training.stand_ins import _Moments
from tests.test_module import make_batch, make_module
from tests.tolerance import close, depth


def case(noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, what a map of rank 2 with a bias makes of them, and that map."""
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(500, 6, generator=generator, dtype=torch.float64)
        @ torch.diag(torch.arange(1.0, 7).double())
        + 2
    )
    matrix = torch.randn(6, 2, generator=generator).double() @ torch.randn(2, 6, generator=generator).double()
    d = x @ matrix - 3 + noise * torch.randn(500, 6, generator=generator, dtype=torch.float64)
    return x, d, matrix


def fitted(x: Tensor, d: Tensor, rank: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    monkeypatch.setattr("qtale_lightning.training.stand_ins.RIDGE", 0.0)
    moments = _Moments()
    for part in (slice(0, 200), slice(200, None)):
        moments.add(x[part], d[part])
    down, up, bias = moments.fit(rank)
    assert down.shape == (rank, 6)
    return x @ down.T @ up.T + bias


def test_a_map_of_its_rank_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    x, d, _ = case(noise=0.0)
    torch.testing.assert_close(fitted(x, d, 2, monkeypatch), d)


def test_no_map_of_its_rank_predicts_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """At full rank it is least squares; below, what it leaves over is the spectrum's tail (Eckart and Young)."""
    x, d, _ = case(noise=5.0)
    ones = torch.cat([x, torch.ones(len(x), 1)], 1)
    best = ones @ torch.linalg.lstsq(ones, d).solution
    torch.testing.assert_close(fitted(x, d, 6, monkeypatch), best)
    spectrum = torch.linalg.svdvals(best - best.mean(0)) ** 2
    for rank in (1, 2, 4):
        left = (d - fitted(x, d, rank, monkeypatch)).square().sum()
        torch.testing.assert_close(left, (d - best).square().sum() + spectrum[rank:].sum())


def rows_of(batch: dict[str, Tensor]) -> Rows:
    lengths = batch["attention_mask"].sum(1)
    return Rows([ids[:n].tolist() for ids, n in zip(batch["input_ids"], lengths, strict=True)], 0.0)


def test_they_are_fitted_to_what_layers_do() -> None:
    """On the rows that they are fitted to, they are nearer to the layer than leaving it out is, in every layer."""
    module = QTALEModule(name="tiny", router_width=16, stand_in_rank=8)
    batch = make_batch()
    module.rows = rows_of(batch)
    module.configure_model()
    module.eval()
    routing = Routing(threshold=0.0, keep=range(6))
    with torch.no_grad():
        module.model(batch["input_ids"], batch["attention_mask"], routing=routing, use_cache=False)
    assert [layer.stand_in is not None for layer in module.model.model.layers] == [False] * 2 + [True] * 4
    for index in (2, 3, 4):
        x, y = (routing.states[i][routing.free] for i in (index, index + 1))
        with torch.no_grad():
            left = (y - module.model.model.layers[index].skip(x)).square().mean()
        assert left < 0.8 * (y - x).square().mean()


def test_they_change_what_skips_and_nothing_else(tmp_path: Path) -> None:
    module, batch = make_module(stand_in_rank=4), make_batch()
    plain = make_module()
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if "stand_in" not in k})
    with torch.no_grad():
        for layer in module.model.model.layers[2:]:
            layer.stand_in.up.weight.normal_()
    ids, outputs = batch["input_ids"], {}
    for name, one in (("with", module), ("without", plain)):
        one.eval()
        with torch.no_grad():
            for threshold in (0.0, 0.5):
                outputs[name, threshold] = one.model(
                    ids, routing=Routing(threshold=threshold), use_cache=False
                ).logits
    terms = depth(module.model.config)
    close(outputs["with", 0.0], outputs["without", 0.0], terms)
    assert (outputs["with", 0.5] - outputs["without", 0.5]).abs().max() > 0.1
    module.merge().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        again = loaded(ids, routing=Routing(threshold=0.5), use_cache=False).logits
    close(again, outputs["with", 0.5], terms)


def test_a_pass_that_resumes_is_a_whole_one() -> None:
    """Layers before it have done their part, stand-ins too."""
    module, ids = make_module(stand_in_rank=4), make_batch()["input_ids"]
    with torch.no_grad():
        for layer in module.model.model.layers[2:]:
            layer.stand_in.up.weight.normal_()
        module.eval()
        thresholds = [0.5, 0.5, 0.5, 0.9]  # of layers 2 to 5: only the last differs
        routing = Routing(threshold=[0.5] * 4, keep=[5])
        module.model.model(ids, routing=routing, use_cache=False)
        routing.threshold, routing.resume = thresholds, 5
        resumed = module.model.model(ids, routing=routing, use_cache=False).last_hidden_state
        whole = module.model.model(
            ids, routing=Routing(threshold=thresholds), use_cache=False
        ).last_hidden_state
    close(resumed, whole, depth(module.model.config))
