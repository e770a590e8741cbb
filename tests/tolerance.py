"""How near two results must be that sum the same products in another order.

A sum of n products of one size, each rounded by eps / 2 of its own, differs between two orders by about √n · eps of
that size. Behind several sums, each taken from the last one's results, the noises add in the same way, so that n is
that of all of them. Processors differ in their order of sums: what passes by a small margin on one fails on another,
hence `MARGIN`; what tests look for (a wrong token, weight, decision or mask) is hundreds of times as large.
"""

import math

import torch
from torch import Tensor
from transformers import LlamaConfig

MARGIN = 8


def noise(expected: Tensor, terms: int) -> float:
    """The largest difference that the order of sums of `terms` products may make, by the largest value there is."""
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    return MARGIN * math.sqrt(terms) * torch.finfo(expected.dtype).eps * largest


def close(actual: Tensor, expected: Tensor, terms: int) -> None:
    """Assert that two tensors of one dtype are the same sums, of `terms` products, up to their order."""
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=noise(expected, terms))


def depth(config: LlamaConfig) -> int:
    """Products that are summed, one behind the other, on the longest way from a token to its logits."""
    heads = config.num_attention_heads * config.head_dim
    layer = 2 * config.hidden_size + config.head_dim + heads + config.intermediate_size
    return config.num_hidden_layers * layer + config.hidden_size
