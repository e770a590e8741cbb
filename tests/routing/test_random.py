"""Layers drawn at random: by a hash that looks at nothing but the token, its position, the layer and the seed."""

import pytest
import torch
from torch import Tensor

from qtale_lightning.models import Routing
from qtale_lightning.routing import METHODS, Rows
from qtale_lightning.routing.methods.random import uniform
from tests.routing.conftest import Make

RANDOM = METHODS["random"]


def gates(make: Make, tokens: Tensor, mask: Tensor | None = None, **fields: float) -> Tensor:
    """``(R, B, T)``."""
    routing = Routing()
    with torch.no_grad():
        make("random", **fields)(tokens, attention_mask=mask, routing=routing, use_cache=False)
    return routing.stacked_gates()


def test_decisions_depend_on_neither_batch_nor_padding(make: Make) -> None:
    tokens = torch.randint(3, 97, (4, 20), generator=torch.Generator().manual_seed(0))
    alone = torch.cat([gates(make, row[None]) for row in tokens], 1)
    assert torch.equal(gates(make, tokens), alone)
    padded = torch.nn.functional.pad(tokens, (6, 0))
    mask = (torch.arange(26) >= 6).long().expand(4, -1)
    assert torch.equal(gates(make, padded, mask)[..., 6:], alone)


def test_another_seed_position_or_token_is_another_draw(make: Make) -> None:
    tokens = torch.randint(3, 97, (4, 40), generator=torch.Generator().manual_seed(0))
    drawn = gates(make, tokens)
    assert not torch.equal(drawn, gates(make, tokens, routing_seed=1))
    same = gates(make, torch.full((1, 200), 7))[..., 2:]
    assert 0.4 < float(same.mean()) < 0.8  # one token, at 198 positions
    assert not torch.equal(same[0], same[1])


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9, 1.0])
def test_a_free_token_executes_at_the_rate(make: Make, rate: float) -> None:
    tokens = torch.randint(3, 97, (50, 60), generator=torch.Generator().manual_seed(0))
    free = gates(make, tokens, rate=rate)[..., 2:]
    assert float(free.mean()) == pytest.approx(rate, abs=0.015)  # 3 standard errors of 11,600 draws
    # Layers are independent: the mean number of those executed has the binomial's variance.
    assert float(free.sum(0).var()) == pytest.approx(4 * rate * (1 - rate), abs=0.08)


def test_the_hash_is_uniform_in_every_argument() -> None:
    near = torch.arange(200)
    grid = uniform(near[:, None].expand(200, 200), near.expand(200, 200), 3, 0)
    for values in (grid, grid[5], grid[:, 5]):
        counts = torch.histc(values.flatten().float(), 10, 0, 1)
        expected = values.numel() / 10
        assert (
            float(((counts - expected) ** 2 / expected).sum()) < 27.9
        )  # χ² of 9 degrees of freedom, p = 0.001
    assert 0 <= float(grid.min()) < float(grid.max()) < 1
    one_by_one = torch.corrcoef(torch.stack([grid.flatten(), uniform(near[:, None], near, 4, 0).flatten()]))
    assert abs(float(one_by_one[0, 1])) < 0.02


def test_the_rate_makes_up_for_reserved_tokens() -> None:
    """Ten layers, two of which always execute, and a tenth of the tokens reserved: 0.7 of all, all tokens together."""
    fields = RANDOM.fields(10, 2, 0.7, 5)
    assert fields["routing_seed"] == 5
    rate = RANDOM.measure(None, Rows([], 0.1), fields)["rate"]
    assert 0.2 + 0.8 * (0.1 + 0.9 * rate) == pytest.approx(0.7)


def test_a_ratio_below_what_always_executes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target_ratio 0.1 can't be reached.*at least 0.200"):
        RANDOM.fields(10, 2, 0.1, 0)


def test_embeddings_have_no_tokens_to_decide_by(make: Make) -> None:
    with pytest.raises(ValueError, match="give the model input_ids"):
        make("random")(inputs_embeds=torch.zeros(1, 4, 32))
