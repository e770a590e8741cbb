"""Paths and their diversity, against counting by hand, and over processes."""

import math
from collections import Counter
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from qtale_lightning.paths import SAMPLE, PathDiversity, path_codes, path_distance, path_statistics, rarefied


def decisions(layers: int, tokens: int, seed: int = 0) -> Tensor:
    """Layers that are executed with different probabilities, bool ``(R, N)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(layers, tokens, generator=generator) < torch.linspace(0.05, 0.95, layers)[:, None]


def counted(paths: Tensor) -> Counter[tuple[bool, ...]]:
    return Counter(map(tuple, paths.T.tolist()))


def test_the_distance_is_the_mean_over_all_pairs_of_tokens() -> None:
    """Of two of them, drawn with replacement, so that a token is in no layer at odds with itself."""
    paths = torch.cat(
        [decisions(6, 40), torch.ones(2, 40, dtype=torch.bool)]
    )  # two layers that always execute
    apart = [float((one != other).float().mean()) for one in paths.T for other in paths.T]
    assert path_distance(paths.float().mean(1).tolist()) == pytest.approx(sum(apart) / len(apart))
    assert path_distance([1.0, 0.0, 1.0]) == 0, "one path"
    assert path_distance([0.5] * 30) == 0.5, "the most that can be"


@pytest.mark.parametrize("layers", [1, 4, 62, 63, 130])
def test_codes_are_equal_iff_paths_are(layers: int) -> None:
    paths = decisions(layers, 200)
    paths = torch.cat([paths, paths[:, :50]], dim=1)
    for layer in range(layers):  # a path that differs in one layer only, the last word's included
        paths = torch.cat([paths, paths[:, :1] ^ (torch.arange(layers) == layer)[:, None]], dim=1)
    codes = path_codes(paths)
    assert codes.shape == (paths.shape[1], -(-layers // 62))
    _, counts = codes.unique(dim=0, return_counts=True)
    assert sorted(counts.tolist()) == sorted(counted(paths).values())


def test_statistics_count_paths() -> None:
    paths = decisions(5, 300)
    counts = counted(paths)
    entropy = -sum(n / 300 * math.log(n / 300) for n in counts.values())
    found = path_statistics(path_codes(paths), 5)
    assert (found["tokens"], found["distinct"]) == (300, len(counts))
    assert found["entropy"] == pytest.approx(entropy)
    assert found["entropy_share"] == pytest.approx(entropy / (5 * math.log(2)))
    assert "entropy_of_500" not in found


def test_entropy_is_a_share_of_what_so_few_tokens_can_have() -> None:
    """Ten tokens of thirty layers, all on paths of their own: no sample of ten could be more diverse."""
    found = path_statistics(path_codes(decisions(30, 10)), 30)
    assert found["distinct"] == 10
    assert found["entropy"] == pytest.approx(math.log(10))
    assert found["entropy_share"] == pytest.approx(1.0)


@pytest.mark.parametrize("tokens", [1, 600])
def test_one_path_has_no_entropy(tokens: int) -> None:
    found = path_statistics(path_codes(torch.ones(3, tokens, dtype=torch.bool)), 3)
    assert (found["distinct"], found["entropy"], found["entropy_share"]) == (1, 0.0, 0.0)
    if tokens >= SAMPLE:
        assert found["distinct_of_500"] == pytest.approx(1)
        assert found["entropy_of_500"] == pytest.approx(0, abs=1e-9)


def test_rarefaction_is_the_mean_over_all_samples() -> None:
    """Of nine tokens on four paths, every one of the 126 sets of four."""
    counts = torch.tensor([4, 3, 1, 1])
    tokens = [path for path, count in enumerate(counts.tolist()) for _ in range(count)]
    samples = [Counter(sample).values() for sample in combinations(tokens, 4)]
    distinct = sum(map(len, samples)) / len(samples)
    entropy = sum(-sum(n / 4 * math.log(n / 4) for n in sample) for sample in samples) / len(samples)
    assert rarefied(counts, 4) == pytest.approx((distinct, entropy))


def test_the_sample_makes_different_numbers_of_tokens_comparable() -> None:
    """Eight times as many tokens of the same distribution: far more paths, but not of 500 tokens."""
    few, many = (path_statistics(path_codes(decisions(12, n, seed=n)), 12) for n in (1000, 8000))
    assert many["distinct"] > 1.5 * few["distinct"]
    assert many["distinct_of_500"] == pytest.approx(few["distinct_of_500"], rel=0.05)
    assert many["entropy_of_500"] == pytest.approx(few["entropy_of_500"], rel=0.02)


def test_batches_make_no_difference() -> None:
    paths = decisions(6, 700)
    metric = PathDiversity()
    for part in paths.split(90, dim=1):
        metric.update(part)
    assert metric.compute() == path_statistics(path_codes(paths), 6)
    metric.reset()
    metric.update(paths[:, :20])
    assert metric.compute()["tokens"] == 20


def test_processes_count_a_path_once() -> None:
    """Two processes with 80 and 20 of the tokens, on paths that are partly the same; the other's codes are sent."""
    parts = decisions(4, 100).split([80, 20], dim=1)

    def gather(codes: Tensor, group: Any = None) -> list[Tensor]:
        assert torch.equal(codes, path_codes(parts[0]))
        return [codes, path_codes(parts[1])]

    metric = PathDiversity(dist_sync_fn=gather, distributed_available_fn=lambda: True)
    metric.update(parts[0])
    whole, *alone = (path_statistics(path_codes(paths), 4) for paths in (decisions(4, 100), *parts))
    assert metric.compute() == whole
    assert whole["distinct"] < sum(one["distinct"] for one in alone)  # else a sum would do
