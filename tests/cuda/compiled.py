"""Compiles the kernels for an H100, with no GPU at hand: `python -m tests.cuda.compiled`, which tests start."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qtale_lightning.cuda import attention, decisions, linear

H100 = GPUTarget("cuda", 90, 32)
FLOATS = {"bf16": "*bf16", "int4": "*u8"}


def size(kernel: Any, signature: dict[str, str], **constants: Any) -> int:
    """Bytes of a kernel's machine code; arguments that aren't named are None."""
    given = {name: constants.get(name) for name in kernel.arg_names if name not in signature}
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    return len(triton.compile(ASTSource(kernel, types, given), target=H100).asm["cubin"])


def main() -> None:
    """Print a kernel a line, with the bytes of its code."""
    tokens = {"x": "*bf16", "norm": "*bf16", "eps": "fp32", "gates": "*i32", "y": "*bf16"}
    counts = dict.fromkeys(("n0", "n1", "n2", "first"), "i32")
    for form, batch in (("int4", 1), ("bf16", 1), ("int4", 8), ("bf16", 8)):
        weights = {f"w{i}": FLOATS[form] for i in range(3)}
        if form == "int4":
            weights |= {f"s{i}": "*fp16" for i in range(3)} | {f"z{i}": "*u8" for i in range(3)}
        two = {name: kind for name, kind in weights.items() if "2" not in name}
        group, rows, block = 128 if form == "int4" else 0, *((16, 256) if batch == 1 else (32, 64))
        shape = {"INPUTS": 4096, "BATCH": batch, "TOKENS": linear.padded(batch), "ROWS": rows, "BLOCK": block}
        code = size(
            linear._linear, tokens | counts | weights, OUTPUTS=6144, GROUP=group, RESIDUAL=True, **shape
        )
        print("linear", form, batch, code)
        code = size(linear._gated_linear, tokens | two, OUTPUTS=14336, G0=group, G1=group, **shape)
        print("gated_linear", form, batch, code)
    floats = dict.fromkeys(("wide", "norm", "out", "out_bias", "threshold", "logits"), "*fp32")
    places = {
        "forced": "*i8",
        "step": "*i64",
        "places": "*i64",
        "gates": "*i32",
        "lengths": "*i32",
        "eps": "fp32",
    }
    strides = dict.fromkeys(("steps", "step_stride", "forced_stride", "reserved"), "i32")
    for keeps in (False, True):
        code = size(decisions._decide, floats | places | strides, KEEPS=keeps, WIDTH=512, BLOCK=512)
        print("decide", keeps, code)
    halves = dict.fromkeys(
        ("heads", "cos", "sin", "keys", "values", "output", "query_norm", "key_norm"), "*bf16"
    )
    others = {
        "positions": "*i64",
        "lengths": "*i32",
        "gates": "*i32",
        "scaling": "fp32",
        "capacity": "i32",
        "eps": "fp32",
    }
    heads = {"GROUPS": 8, "SHARED": 4, "WIDTH": 128, "QUERIES": 16, "BLOCK": 64}
    for keeps in (False, True):
        print("attend", keeps, size(attention._attend, halves | others, KEEPS=keeps, **heads))
    levels = {"weight": "*u8", "scales": "*fp16", "zeros": "*u8", "y": "*bf16", "outputs": "i32"}
    print("dequantize", size(linear._dequantize, levels, INPUTS=4096, GROUP=128, ROWS=16, BLOCK=128))


if __name__ == "__main__":
    main()
