"""In which precision a device computes: the one place that decides it.

bfloat16 where the device has instructions for it, else float32. Without them PyTorch converts every factor of a product
on its way, at a tenth of float32's speed or less. float16 is never chosen: its range wants loss scaling, and weights
that were trained in bfloat16 may leave it.
"""

import os
import time
from typing import Literal

import torch

Precision = Literal["bf16-mixed", "32-true"]
"""What training may be left to: Lightning's names."""

Origin = Literal["given", "kept", "chosen"]
"""Of a training's precision: asked for, that of a run that goes on, or left to the device."""

PRECISIONS: tuple[Precision, Precision] = ("bf16-mixed", "32-true")

_AVX2 = ("avx2", "fma3", "f16c")
_AVX512 = (*_AVX2, "avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")
INSTRUCTION_SETS = {
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": (*_AVX512, "avx512_vnni", "avx512_bf16"),
    "neon": ("neon",),
}
"""What processors differ in, each by what `torch.cpu.get_capabilities` calls it; better ones behind lesser ones."""

# What oneDNN can be limited to by an environment variable (it takes any case), and what that leaves.
_ONEDNN_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_ONEDNN_LEAVES = (
    dict.fromkeys(("SSE41", "AVX"), ())
    | dict.fromkeys(("AVX2", "AVX2_VNNI", "AVX2_VNNI_2"), ("avx2",))
    | dict.fromkeys(("AVX512_CORE", "AVX512_CORE_VNNI"), ("avx2", "avx512"))
)


def instruction_sets() -> list[str]:
    """Those of :data:`INSTRUCTION_SETS` that this processor has, the best first.

    Not those that PyTorch is told to leave alone, by ``ATEN_CPU_CAPABILITY`` or ``ONEDNN_MAX_CPU_ISA``: a machine that
    is made to behave as a lesser one is that one wholly.
    """
    has = torch.cpu.get_capabilities()
    found = {name for name, needs in INSTRUCTION_SETS.items() if all(has.get(need) for need in needs)}
    if has["architecture"] == "x86_64":
        capability = torch.backends.cpu.get_cpu_capability()
        if capability != "AVX512":
            found &= {"avx2"} if capability == "AVX2" else set()
        for name in _ONEDNN_LIMITS:
            found &= set(_ONEDNN_LEAVES.get(os.environ.get(name, "").upper(), found))
    return [name for name in reversed(INSTRUCTION_SETS) if name in found]


def native_bfloat16(device: str | torch.device = "cpu") -> bool:
    """Whether a device multiplies bfloat16 by instructions of its own.

    A CPU by AVX-512's or AMX's, or ARM's; not where PyTorch is told to leave them alone (``ATEN_CPU_CAPABILITY``,
    ``ONEDNN_MAX_CPU_ISA``). A GPU from compute capability 8.0 on (every one, where there are several).
    """
    kind = torch.device(device).type
    if kind == "cuda":
        capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        return torch.version.hip is not None or min(capabilities) >= (8, 0)
    if kind != "cpu":
        return False
    has = torch.cpu.get_capabilities()
    if has["architecture"] == "x86_64":
        return "avx512_bf16" in instruction_sets()  # whatever has AMX has these, too
    return bool(has.get("bf16"))


def device_of(accelerator: str) -> str:
    """The kind of device that Lightning's ``--trainer.accelerator`` means here."""
    if accelerator in ("auto", "gpu"):
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    return accelerator if accelerator in ("cuda", "mps") else "cpu"


def training_precision(accelerator: str) -> Precision:
    """What training is left to where nothing is said."""
    return "bf16-mixed" if native_bfloat16(device_of(accelerator)) else "32-true"


def inference_dtype(device: str | torch.device) -> torch.dtype | Literal["auto"]:
    """The dtype to load a trained model in, to compute with it: as it is stored, or float32 where that is faster."""
    return "auto" if native_bfloat16(device) else torch.float32


def remark(precision: str, accelerator: str, origin: Origin) -> str | None:
    """One line about a training's precision; None where there is nothing to say.

    Args:
        precision: As the trainer takes it.
        accelerator: As well.
    """
    device = device_of(accelerator)
    native = native_bfloat16(device)
    lacking = f"{'this processor has' if device == 'cpu' else f'{device} has here'} no bfloat16 instructions"
    if precision.startswith("bf16") and not native:
        how = "as this run began" if origin == "kept" else "as asked"
        return (
            f"training in {precision}, {how}, which is slow: {lacking}, and its products take "
            f"{slowdown(device):.0f} times as long as in float32 (--trainer.precision 32-true in a new run)"
        )
    if precision == "32-true" and origin == "chosen":
        return f"training in float32: {lacking} (--trainer.precision chooses otherwise)"
    if precision == "32-true" and origin == "kept" and native:
        return "training in float32, as this run began, though bfloat16 would be faster here"
    return None


def slowdown(device: str) -> float:
    """How many times as long as in float32 products take in bfloat16, measured in a fraction of a second.

    Both of a linear's products that depend on tokens: its own, and that of its gradient.
    """

    def seconds(dtype: torch.dtype) -> float:
        tokens, weight = (torch.ones(size, 512, dtype=dtype, device=device) for size in (64, 512))
        spent = []
        for _ in range(3):
            started = time.perf_counter()
            (tokens @ weight.T @ weight)[0, 0].item()  # the number is there when the device has computed
            spent.append(time.perf_counter() - started)
        return min(spent)

    return seconds(torch.bfloat16) / seconds(torch.float32)
