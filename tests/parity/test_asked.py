"""The last layer computes only what is asked for: the same logits, decisions and cache, with less work.

Fewer rows in a product sum in another order (tests/tolerance.py).
"""

import pytest
import torch
from torch import Tensor

from qtale_lightning.models import RoutedCache, RoutedForCausalLM, Routing
from tests.parity.conftest import TERMS
from tests.tolerance import close

pytestmark = pytest.mark.usefixtures("operations")

LENGTHS = (13, 9, 5, 2)


def rows(side: str) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of ragged sequences, padded on a side."""
    longest = max(LENGTHS)
    ids = torch.randint(97, (len(LENGTHS), longest), generator=torch.Generator().manual_seed(3))
    place, lengths = torch.arange(longest), torch.tensor(LENGTHS)[:, None]
    return ids, (place < lengths if side == "right" else place >= longest - lengths).long()


@torch.no_grad()
def widest_product(model: RoutedForCausalLM, ids: Tensor, **call: object) -> tuple[int, Tensor]:
    """Rows that the last layer's MLP sees in a call (0: it isn't computed), and the logits."""
    seen = [0]
    hook = model.model.layers[-1].mlp.register_forward_pre_hook(
        lambda mlp, args: seen.append(args[0].numel() // args[0].shape[-1])
    )
    logits = model(ids, **call).logits
    hook.remove()
    return max(seen), logits


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kept", [1, 3])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_logits_to_keep(routed: RoutedForCausalLM, side: str, kept: int, threshold: float) -> None:
    ids, mask = rows(side)
    routings = Routing(threshold=threshold), Routing(threshold=threshold)
    call = {"attention_mask": mask, "use_cache": False}
    everything, expected = widest_product(routed, ids, routing=routings[0], **call)
    some, found = widest_product(routed, ids, routing=routings[1], logits_to_keep=kept, **call)
    real = mask[:, -kept:].bool()
    close(found[real], expected[:, -kept:][real], TERMS)
    assert some <= real.sum() < everything
    for layer, gate in routings[0].gates.items():  # all decisions are made and counted
        assert torch.equal(gate, routings[1].gates[layer])


@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("keep_kv", [False, True])
@torch.no_grad()
def test_the_cache_is_whole(routed: RoutedForCausalLM, side: str, threshold: float, keep_kv: bool) -> None:
    """A prompt in two parts, of which only the last logits were asked for, and a token after it."""
    routed.config.threshold, routed.config.keep_kv = threshold, keep_kv
    ids, mask = rows(side)
    if side == "none":
        mask = torch.ones_like(mask)
    after = torch.randint(97, (len(ids), 1), generator=torch.Generator().manual_seed(4))
    longer = torch.cat([mask, torch.ones_like(after)], 1)
    logits, caches = [], []
    for kept in (0, 1):
        cache = RoutedCache()
        routed(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache, logits_to_keep=kept)
        routed(ids[:, 6:], attention_mask=mask, past_key_values=cache, logits_to_keep=kept)
        logits.append(routed(after, attention_mask=longer, past_key_values=cache).logits)
        caches.append(cache)
    close(logits[1], logits[0], TERMS)
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert one.lengths == other.lengths
        for i, n in enumerate(one.lengths):
            close(other.keys[i, :, :n], one.keys[i, :, :n], TERMS)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("keep_kv", [False, True])
@torch.no_grad()
def test_any_positions_and_branches(
    routed: RoutedForCausalLM, seed: int, threshold: float, keep_kv: bool
) -> None:
    """What is asked for may lie anywhere, also in branches of a prompt."""
    routed.config.keep_kv = keep_kv
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(97, (3, 12), generator=generator)
    branch = torch.tensor([0] * 6 + [1] * 3 + [2] * 3)[:, None].expand(3, 12, 1)
    position = torch.tensor([*range(6), 6, 7, 8, 6, 7, 8]).expand(3, 12)
    asked = torch.rand(3, 12, generator=generator) < 0.3
    hidden = [
        routed.model(
            ids,
            position_ids=position,
            use_cache=False,
            routing=Routing(threshold=threshold, branch=branch, asked=what),
        ).last_hidden_state
        for what in (None, asked)
    ]
    close(hidden[1][asked], hidden[0][asked], TERMS)
    assert not torch.allclose(
        hidden[1][~asked], hidden[0][~asked]
    )  # these were left as they entered the layer


@torch.no_grad()
def test_nobody_that_is_asked_for_executes_the_last_layer(routed: RoutedForCausalLM) -> None:
    """With kept keys and values, which all tokens leave, those that skip the layer stay as they are."""
    routed.config.keep_kv = True
    ids, _ = rows("right")
    asked = torch.arange(ids.shape[1]).expand(ids.shape) == 7
    forced = {i: ~asked if i == 4 else torch.ones_like(asked) for i in routed.config.routed_layers}
    routings = Routing(forced=forced, asked=asked, keep=[4]), Routing(forced=forced, execution="masked")
    some, all_ = (
        routed.model(ids, routing=routing, use_cache=False).last_hidden_state for routing in routings
    )
    close(some[asked], all_[asked], TERMS)


@torch.no_grad()
def test_training_and_masked_execution_compute_everything(routed: RoutedForCausalLM) -> None:
    ids, _ = rows("right")
    whole, expected = widest_product(routed, ids, routing=Routing(execution="masked"), use_cache=False)
    some, found = widest_product(
        routed, ids, routing=Routing(execution="masked"), use_cache=False, logits_to_keep=1
    )
    assert some == whole == ids.numel()
    assert torch.equal(found, expected[:, -1:])
