"""Who is measured: each engine with each format of weights, what it is told, and what can be chosen for it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import qtale_lightning
from peer import install
from peer.process import Failed, Process
from qtale_lightning import digests

MEASURES = ("decode", "prompt")
ENGINES = ("Hugging Face", "ours", "llama.cpp", "ik_llama.cpp", "ik_llama.cpp wheel", "OpenVINO GenAI")

# As a machine without AVX-512: PyTorch's operations, those of oneDNN (OpenVINO's, too) and MKL, and ours.
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "QTALE_CPU_ISA": "avx2",
}


@dataclass(frozen=True)
class Contender:
    """One row: an engine's process, and what of it can be chosen.

    Attributes:
        engine, weights: What the row is called.
        module, python, environment: Of its process.
        config: Besides settings and tokens.
        choices: Values to try of each setting, the engine's usual one first.
        facts: Columns that are known before: `bits` of a weight with its scale, `types` of the layers' weights, how
            many weights of a `group` share a scale, the `head`'s type (None: that of activations), and `ratio`.
        same: Engines with the same of it are to decode the same tokens, up to rounding.
        version: Of what settings are chosen for.
    """

    engine: str
    weights: str
    module: str
    python: Path
    config: dict[str, Any]
    choices: dict[str, list[Any]]
    facts: dict[str, Any]
    same: str
    version: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def peer(self) -> bool:
        """Whether it is another's engine for weights of few bits."""
        return self.engine not in ("ours", "Hugging Face")

    @property
    def name(self) -> str:
        """Engine, weights and ratio."""
        ratio = self.facts["ratio"]
        return f"{self.engine} {self.weights}" + ("" if ratio == 1 else f", ratio {ratio:g}")

    def start(self, settings: dict[str, dict[str, Any]], tokens: dict[str, Any]) -> Process:
        """Its process, loaded; raises :class:`Failed`."""
        config = self.config | {"settings": settings} | tokens
        return Process(self.python, self.module, config, self.environment)

    def usual(self) -> dict[str, dict[str, Any]]:
        """The settings to start from."""
        return {measure: {key: values[0] for key, values in self.choices.items()} for measure in MEASURES}


def pytorch(
    python: Path, model: str, ratios: Sequence[float], group: int, environment: dict[str, str]
) -> Iterator[Contender]:
    """Hugging Face's model in either precision, and ours at 4 bits at each ratio.

    With the head and tokens of the paper's setting, in 16 bits, and as peers have them: heads in 8 or 4, tokens in 8.
    """
    facts: dict[str, Any]
    path = install.unpacked(model)
    config = {"model": model, "path": str(path) if path else None, "group size": group}
    for dtype, bits in (("float32", 32.0), ("bfloat16", 16.0)):
        facts = {"bits": bits, "types": dtype, "group": "", "head": dtype, "ratio": 1.0}
        yield Contender(
            "Hugging Face", dtype, "peer.ours", python, config | {"ratio": None}, {"dtype": [dtype]}, facts,
            "Q4_1", environment=environment,
        )  # fmt: skip
    dtypes = ["float32", "bfloat16"] if environment else ["bfloat16", "float32"]
    forms = (
        ("int4", 16, 16),
        ("int4, head in 8", 8, 16),
        ("int4, head and tokens in 8", 8, 8),
        ("int4, head in 4", 4, 16),
        ("int4, head in 4, tokens in 8", 4, 8),
    )
    for weights, head, tokens in forms:
        for ratio in ratios:
            facts = {"bits": 4 + (16 + 8) / group, "types": "int4", "group": group, "ratio": ratio}
            yield Contender(
                "ours", weights, "peer.ours", python,
                config | {"ratio": ratio, "head bits": head, "token bits": tokens}, {"dtype": dtypes},
                facts | {"head": None if head == 16 else f"int{head}"}, f"{weights} at {ratio}", code(), environment,
            )  # fmt: skip


def code() -> str:
    """Of ours: settings that were chosen for other code may not be the best any more."""
    package = Path(qtale_lightning.__file__).parent
    files = sorted(file for kind in ("py", "h", "cpp") for file in package.rglob(f"*.{kind}"))
    return digests.of([file.read_text(encoding="utf-8") for file in files])


def ggml(
    library: str, builds: Sequence[str | None], formats: Sequence[str], threads: int
) -> Iterator[Contender]:
    """llama.cpp or ik_llama.cpp, with all formats of weights, of the first build that works.

    Args:
        library: Of the two.
        builds: Of :data:`install.BUILDS`; None is the wheel.
        formats: Of :data:`install.FILES`.
        threads: At most.

    Raises:
        install.Unavailable: There is none, or none works.
    """
    package = {"llama.cpp": "llama-cpp-python", "ik_llama.cpp": "ik-llama-cpp-python"}[library]
    choices: dict[str, list[Any]] = {"repack": [True, False]}
    if library == "llama.cpp":
        choices |= {"mmap": [True, False]}
    else:  # only a model that isn't mapped is repacked at run time
        choices |= {"mmap": [False, True], "merged qkv": [False, True]}
    choices |= {
        "flash attention": [True, False],
        "threads": thread_counts(threads),
        "ubatch": [512, 128],
    }
    for build in builds:
        python = install.environment(package, build)
        made = []
        for name in formats:
            file = install.quantized(name)
            made.append(
                Contender(
                    library if build else f"{library} wheel", name, "peer.ggml", python,
                    {"library": library, "file": str(file)}, choices,
                    install.format_of(file) | {"group": 32, "ratio": 1.0}, name, f"{package} {build}",
                )
            )  # fmt: skip
        if reason := broken(made[0], "AVX512" if build == "AVX2" else None):
            if build is not None:
                reason += f" (built in {install.place_of(package, build)}: remove it to build it again)"
            continue
        yield from made
        return
    raise install.Unavailable(reason)


def broken(contender: Contender, without: str | None) -> str:
    """Why an engine doesn't decode with its usual settings: a build can crash on some processors. Empty if it does.

    Args:
        contender: The engine.
        without: What none of the instructions that it says it uses may begin with.
    """
    tokens = {"context": [1, 2], "prompt": [1, 2], "warm": 0, "steps": 1}
    try:
        with contender.start(contender.usual(), tokens) as process:
            process.ask("decode")
            says = process.says["instructions"]
            if without and without in says:
                return f"it says that it uses {says}, and is to do without {without}"
    except Failed as error:
        return str(error)
    return ""


def genai(formats: Sequence[str], threads: int, environment: dict[str, str]) -> Iterator[Contender]:
    """OpenVINO GenAI, which reads GGUF files by itself; where it is limited, in float32 without activations in 8 bits.

    Raises:
        install.Unavailable: It isn't installed, or the files aren't there.
    """
    python = install.environment("openvino-genai")
    choices: dict[str, list[Any]] = {
        "ATTENTION_BACKEND": ["PA", "SDPA"],
        "INFERENCE_PRECISION_HINT": ["f32"] if environment else [None, "f32"],
        # Its products of activations in 8 bits compute nonsense where oneDNN is limited and OpenVINO itself isn't.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": [0] if environment else [None, 0, 64],
        "KV_CACHE_PRECISION": [None, "f16"],
        "INFERENCE_NUM_THREADS": thread_counts(threads),
    }
    for name in formats:
        file = install.quantized(name)
        yield Contender(
            "OpenVINO GenAI", name, "peer.genai", python, {"file": str(file)}, choices,
            install.format_of(file) | {"group": 32, "ratio": 1.0}, name,
            install.VERSIONS["openvino-genai"], environment,
        )  # fmt: skip


def thread_counts(threads: int) -> list[int]:
    """All, and half of them: threads of one core may be in each other's way."""
    return [threads, *([threads // 2] if threads > 1 else [])]


def everyone(
    python: Path,
    model: str,
    ratios: Sequence[float],
    group: int,
    threads: int,
    isa: str,
    engines: Sequence[str],
) -> tuple[list[Contender], dict[str, str]]:
    """All that are to be had here, and by name why the others aren't.

    Args:
        python: Ours.
        model: Of ours; the peers have SmolLM2-135M.
        ratios: Of ours.
        group: Weights that share a scale, of ours.
        threads: At most.
        isa: "native" or "avx2".
        engines: Of :data:`ENGINES`.
    """
    environment = AVX2 if isa == "avx2" else {}
    builds = ["AVX2"] if environment else ["native", "AVX-512"]
    formats = ("Q4_0", "Q4_0, head too", "Q4_K_S")
    found = [one for one in pytorch(python, model, ratios, group, environment) if one.engine in engines]
    peers = {"llama.cpp": lambda: ggml("llama.cpp", builds, ("Q4_1", *formats), threads)}
    if not environment:  # the wheel is compiled for AVX2
        peers["ik_llama.cpp"] = lambda: ggml("ik_llama.cpp", builds, formats, threads)
    peers["ik_llama.cpp wheel"] = lambda: ggml("ik_llama.cpp", [None], formats, threads)
    peers["OpenVINO GenAI"] = lambda: genai(formats[:2], threads, environment)
    lacking = {}
    for name, make in peers.items():
        if name not in engines:
            continue
        try:
            found += make()
        except install.Unavailable as reason:
            lacking[name] = str(reason)
    return found, lacking
