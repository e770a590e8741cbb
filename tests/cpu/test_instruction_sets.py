"""Every instruction set computes the same, to the last bit: sums have the order of the source, not of registers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from qtale_lightning import cpu, precision
from qtale_lightning.quantization.int4_cpu import Int4Strips
from qtale_lightning.quantization.planes import PlaneStrips
from qtale_lightning.quantization.rtn import Scheme, quantize

SETS = precision.instruction_sets() if cpu.available() else []


def results(operations: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tokens, query, key = numbers(4, 576), numbers(1, 9, 64), numbers(1, 3, 64)
    buffers = [numbers(1, 3, 300, 64) for _ in range(2)]
    router = (
        numbers(128, 576),
        numbers(128),
        numbers(128).float(),
        1e-6,
        numbers(2, 128).float(),
        torch.ones(2),
    )
    weight = Int4Strips(quantize(numbers(80, 576).float(), Scheme(4, 64)))
    packed = weight.packed, weight.scales, weight.zeros
    planes = PlaneStrips(quantize(numbers(80, 576).float(), Scheme(3, 64)))
    laid = planes.high, planes.scales, planes.zeros, planes.single
    found = {
        "rms_norm": operations.rms_norm(tokens, numbers(576), 1e-5),
        "rotate": operations.rotate(tokens.view(1, 4, 9, 64), numbers(1, 4, 64), numbers(1, 4, 64)),
        "swiglu": operations.swiglu(tokens, 8 * tokens),
        "attend_next": operations.attend_next(query, key, key, *buffers, [0], [290], 0.125),
        "route": operations.route(tokens, *router),
        "int4_linear_rounded": operations.int4_linear_rounded(tokens, *packed),
        "int4_dequantize": operations.int4_dequantize(*packed, 16, 48, tokens),
        "plane_dequantize": operations.plane_dequantize(*laid, 16, 48, tokens),
    }
    if dtype == torch.float32:  # bfloat16 is multiplied in pairs where there is an instruction for it
        for n in (1, 2, 4):
            found[f"int4_linear {n}"] = operations.int4_linear(tokens[:n], *packed)
            found[f"plane_linear {n}"] = operations.plane_linear(tokens[:n], *laid)
    return found


@pytest.mark.skipif(
    len(SETS) < 2, reason="this processor has no two instruction sets that ours were built for"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_agree(dtype: torch.dtype) -> None:
    best, *others = (results(cpu.operations(name), dtype) for name in SETS)
    for other in others:
        assert [name for name, value in other.items() if not torch.equal(value, best[name])] == []
