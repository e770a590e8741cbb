"""What lies in huge pages is what it was, and is moved only where nobody else sees its memory."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from qtale_lightning import huge_pages


def test_a_copy_is_equal_and_its_own() -> None:
    for tensor in (torch.randn(48, 96).T, torch.arange(5, dtype=torch.uint8), torch.randn(3).bfloat16()):
        copied = huge_pages.placed(tensor)
        assert torch.equal(copied, tensor)
        assert copied.dtype == tensor.dtype
        assert copied.is_contiguous()
    first, second = (huge_pages.placed(torch.full((7,), value)) for value in (1.0, 2.0))
    first.fill_(3)
    assert torch.equal(second, torch.full((7,), 2.0))
    assert second.data_ptr() % 64 == first.data_ptr() % 64


def test_in_inference_mode_and_outside() -> None:
    with torch.inference_mode():
        inside = huge_pages.placed(torch.ones(4))
    outside = huge_pages.placed(torch.ones(4))
    assert torch.equal(inside + outside, torch.full((4,), 2.0))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="huge pages are asked for on Linux")
def test_memory_is_asked_for() -> None:
    """The kernel's notes of the mapping have the flag, whether it has huge pages to give or not."""
    address, flags = huge_pages.placed(torch.ones(huge_pages.SIZE)).data_ptr(), []
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        words = line.split()
        if "-" in words[0]:
            first, last = (int(end, 16) for end in words[0].split("-"))
            here = first <= address < last
        elif words[0] == "VmFlags:" and here:
            flags = words
    assert "hg" in flags or not Path("/sys/kernel/mm/transparent_hugepage").exists()


def test_parameters_are_moved_in_place() -> None:
    linear = nn.Linear(16, 16)
    before, weight, place = linear.weight.detach().clone(), linear.weight, linear.weight.data_ptr()
    huge_pages.settle(linear.weight)
    assert linear.weight is weight
    assert torch.equal(weight, before)
    assert weight.data_ptr() != place or not sys.platform.startswith("linux")
    linear(torch.ones(16)).sum().backward()
    assert torch.equal(weight.grad, torch.ones(16, 16))
    twin = copy.deepcopy(linear)
    weight.data.zero_()
    assert torch.equal(twin.weight, before)


def test_a_parameter_that_inference_has_moved_is_trained() -> None:
    linear = nn.Linear(16, 16)
    with torch.inference_mode():
        huge_pages.settle(linear.weight)
    assert bool(linear.weight.isfinite().all())
    linear(torch.ones(1, 16, requires_grad=True)).sum().backward()
    assert torch.equal(linear.weight.grad, torch.ones(16, 16))


def test_memory_that_others_see_is_left_alone() -> None:
    whole = torch.zeros(2, 16, 16)
    part = nn.Parameter(whole[1])  # as in sharded training
    shared = nn.Parameter(torch.zeros(16).share_memory_())
    for parameter in (part, shared):
        place = parameter.data_ptr()
        huge_pages.settle(parameter)
        assert parameter.data_ptr() == place
