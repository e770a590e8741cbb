"""Which precision devices compute in: the decision, what is said of it, and where it reaches."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from qtale_lightning import precision
from qtale_lightning.cli import QTALECLI
from qtale_lightning.cpu import build
from qtale_lightning.routing.perturbation import UNPERTURBED
from qtale_lightning.run import RunDirectory
from qtale_lightning.tables.declaration import Line
from qtale_lightning.tables.runs import Request, known_runs, resolve

Options = Callable[..., list[str]]

HASWELL = {"architecture": "x86_64", "avx2": True, "fma3": True, "f16c": True}
SKYLAKE_X = HASWELL | dict.fromkeys(("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl"), True)
ICE_LAKE = SKYLAKE_X | {"avx512_vnni": True, "avx512_bf16": False}
ZEN_4 = ICE_LAKE | {"avx512_bf16": True, "amx_bf16": False}
SAPPHIRE_RAPIDS = ZEN_4 | {"amx_bf16": True}
SANDY_BRIDGE = {"architecture": "x86_64", "avx2": False}
GRAVITON_3, M1 = ({"architecture": "arm64", "neon": True, "bf16": has} for has in (True, False))


def has_bfloat16(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    """The processor has the instructions, or hasn't."""
    monkeypatch.setattr(precision, "native_bfloat16", lambda device="cpu": native)


# ------------------------------------------------------------------------------------------------ the decision


@pytest.mark.parametrize(
    ("processor", "capability", "limits", "best"),
    [
        (SAPPHIRE_RAPIDS, "AVX512", {}, "avx512_bf16"),
        (ZEN_4, "AVX512", {}, "avx512_bf16"),
        (ICE_LAKE, "AVX512", {}, "avx512"),
        (SKYLAKE_X, "AVX512", {}, "avx512"),
        (HASWELL, "AVX2", {}, "avx2"),
        (SANDY_BRIDGE, "DEFAULT", {}, None),
        (SAPPHIRE_RAPIDS, "AVX2", {}, "avx2"),  # ATEN_CPU_CAPABILITY=avx2
        (SAPPHIRE_RAPIDS, "DEFAULT", {}, None),
        (SAPPHIRE_RAPIDS, "AVX512", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "avx2"),
        (SAPPHIRE_RAPIDS, "AVX512", {"ONEDNN_MAX_CPU_ISA": "avx512_core_vnni"}, "avx512"),
        (SAPPHIRE_RAPIDS, "AVX512", {"DNNL_MAX_CPU_ISA": "AVX512_CORE"}, "avx512"),
        (SAPPHIRE_RAPIDS, "AVX512", {"DNNL_MAX_CPU_ISA": "SSE41"}, None),
        (SAPPHIRE_RAPIDS, "AVX2", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "avx2"),
        (SAPPHIRE_RAPIDS, "AVX512", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "avx512_bf16"),
        (SAPPHIRE_RAPIDS, "AVX512", {"ONEDNN_MAX_CPU_ISA": "DEFAULT"}, "avx512_bf16"),
        (GRAVITON_3, "DEFAULT", {}, "neon"),
        (M1, "DEFAULT", {}, "neon"),
    ],
)
def test_processors(
    processor: dict[str, object],
    capability: str,
    limits: dict[str, str],
    best: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in limits.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    native = best == "avx512_bf16" or processor is GRAVITON_3
    assert precision.native_bfloat16() == native
    assert precision.inference_dtype("cpu") == ("auto" if native else torch.float32)
    monkeypatch.delenv(build.CHOICE, raising=False)
    assert build.instruction_set() == best
    if best is None:
        assert build.unavailable() is not None
    if best == "avx512":
        assert precision.instruction_sets() == ["avx512", "avx2"]


@pytest.mark.parametrize(
    ("capabilities", "native"), [([(8, 0)], True), ([(7, 5)], False), ([(9, 0), (7, 0)], False)]
)
def test_gpus(capabilities: list[tuple[int, int]], native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of those that training may take."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.version, "hip", None)
    for accelerator in ("auto", "gpu", "cuda"):
        assert precision.training_precision(accelerator) == ("bf16-mixed" if native else "32-true")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert precision.native_bfloat16("cuda")


def test_without_a_gpu_the_processor_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert {precision.device_of(accelerator) for accelerator in ("auto", "cpu")} == {"cpu"}
    assert not precision.native_bfloat16("mps")


# ------------------------------------------------------------------------------------------------- what is said


@pytest.mark.parametrize(
    ("native", "asked", "origin", "said"),
    [
        (True, "bf16-mixed", "chosen", None),
        (True, "bf16-mixed", "given", None),
        (True, "32-true", "given", None),
        (True, "32-true", "kept", "as this run began, though bfloat16 would be faster"),
        (False, "32-true", "chosen", "this processor has no bfloat16 instructions"),
        (False, "32-true", "given", None),
        (False, "bf16-mixed", "given", "as asked, which is slow: .* take 7 times as long as in float32"),
        (False, "bf16-mixed", "kept", "as this run began, which is slow"),
    ],
)
def test_remarks(
    native: bool, asked: str, origin: precision.Origin, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_bfloat16(monkeypatch, native)
    monkeypatch.setattr(precision, "slowdown", lambda device: 7.2)
    found = precision.remark(asked, "cpu", origin)
    if said is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(said, found)
        assert "\n" not in found


def test_the_slowdown_is_measured() -> None:
    assert precision.slowdown("cpu") > 0.01


# ---------------------------------------------------------------------------------------------- where it reaches


def configured(options: Options, root: Path, *more: str) -> QTALECLI:
    """SmolLM2, whose precision is left to the device."""
    return QTALECLI(
        options("smollm2-135m", "qtale", "--out", str(root), "--trainer.accelerator", "cpu", *more), "fit"
    )


@pytest.mark.parametrize(("native", "name"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_run_begins_in_what_its_processor_computes(
    native: bool,
    name: str,
    options: Options,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    has_bfloat16(monkeypatch, native)
    cli = configured(options, tmp_path)
    assert (cli.config["trainer"]["precision"], cli.precision_origin) == (name, "chosen")
    assert yaml.safe_load(cli.config_text())["trainer"]["precision"] == name
    given = configured(options, tmp_path, "--trainer.precision", "bf16-mixed")
    assert (given.config["trainer"]["precision"], given.precision_origin) == ("bf16-mixed", "given")


def test_a_run_goes_on_in_its_own_precision(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moved to a processor that is left to choose otherwise; what is asked for is compared."""
    has_bfloat16(monkeypatch, False)
    first = configured(options, tmp_path)
    first.run.claim(first.config_text())
    has_bfloat16(monkeypatch, True)
    again = configured(options, tmp_path)
    assert (again.config["trainer"]["precision"], again.precision_origin) == ("32-true", "kept")
    again.run.claim(again.config_text())
    other = configured(options, tmp_path, "--trainer.precision", "bf16-mixed")
    with pytest.raises(ValueError, match="precision is 32-true there, bf16-mixed here"):
        other.run.claim(other.config_text())


def test_a_table_finds_runs_that_began_on_another_processor(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = (Path("experiments/base.yaml"), Path("experiments/models/smollm2-135m.yaml"))
    request = Request("smollm2-135m", "facts", (0,), tmp_path, ("--trainer.accelerator", "cpu"))

    def wanted(*given: tuple[str, str]) -> Path:
        line = Line("a", "qtale", given, (), 16, "none", None, UNPERTURBED, (), "")
        return resolve(request, base, line, "facts", 0, known_runs(tmp_path)).directory.root

    has_bfloat16(monkeypatch, False)
    there = tmp_path / "elsewhere" / "run"
    RunDirectory(there).claim(configured(options, tmp_path).config_text())
    assert wanted() == there
    has_bfloat16(monkeypatch, True)
    assert wanted() == there
    assert wanted(("trainer.precision", "32-true")) == there
    assert wanted(("trainer.precision", "bf16-mixed")) != there
