"""Arithmetic of the kernels, which Triton's interpreter on a CPU does as a GPU does it.

The interpreter holds bfloat16 as its bits, and would multiply and add these as whole numbers.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def rounded_product(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """a · b of one dtype, rounded once."""
    return (a.to(tl.float32) * b.to(tl.float32)).to(a.dtype)


@triton.jit
def rounded_sum(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """a + b of one dtype, rounded once."""
    return (a.to(tl.float32) + b.to(tl.float32)).to(a.dtype)


@triton.jit
def rounded_difference(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """a - b of one dtype, rounded once."""
    return (a.to(tl.float32) - b.to(tl.float32)).to(a.dtype)


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, c: tl.tensor) -> tl.tensor:
    """a · b + c of matrices, c in float32: by tensor cores, but for float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")
