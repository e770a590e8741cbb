"""A model's real size on a CPU: random weights through `fit`, its seconds and memory by stage, beside what `plan` says.

    .venv/bin/python benchmarks/real_size.py --model llama2-7b --folder /tmp/7b --json benchmarks/results/real_size.json

Makes a folder of random bfloat16 weights, one decoder layer at a time, and runs, in a process of its own, one optimizer
step, export, quantization of all layers and the scoring of single questions. LLaMA-2-7B takes 18 GiB of memory, 32 GB
of disk in --folder, and an hour. The folder is removed afterwards unless `--keep` is given.
"""

import contextlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import claim, parser, report, show
from safetensors.torch import save_file
from torch import Tensor

from qtale_lightning.allocator import give_back
from qtale_lightning.configuration import PlannedRun
from qtale_lightning.memory import PROCESS, quantizing_bytes, training_bytes
from qtale_lightning.models.families import classes_of
from qtale_lightning.models.sources import base_config, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SECONDS_BETWEEN = 0.1  # looks at the process
GIB = 2**30
STAGES = ("train", "export", "quantize", "score")


def write_weights(name: str, folder: Path) -> None:
    """A known model's folder: random weights in bfloat16, and the tokenizer of `tiny`, whose tokens all are in it."""
    config = base_config(name)
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)
    with torch.device("meta"):
        model = classes_of(config).plain(config)
    shards: dict[str, dict[str, torch.Size]] = {}
    for key, value in model.state_dict().items():
        if not (key == "lm_head.weight" and config.tie_word_embeddings):
            layer = key.split(".")[2] if ".layers." in key else key.split(".")[-2]
            shards.setdefault(f"model-{layer}.safetensors", {})[key] = value.shape
    generator = torch.Generator().manual_seed(0)
    for file, shapes in shards.items():
        save_file(
            {key: _random(shape, generator) for key, shape in shapes.items()},
            folder / file,
            {"format": "pt"},
        )
    places = {key: file for file, shapes in shards.items() for key in shapes}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _random(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Norms' weights of ones, all else as models begin."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    drawn = torch.empty(min(math.prod(shape), 2**22), dtype=torch.bfloat16).normal_(
        0, 0.02, generator=generator
    )
    return drawn.repeat(-(-math.prod(shape) // len(drawn)))[: math.prod(shape)].view(shape).clone()


def options(args: Any, weights: Path, out: Path) -> list[str]:
    """Of one step, one precision and single questions."""
    given = ["--config", str(ROOT / "experiments" / "base.yaml")]
    given += ["--config", str(ROOT / "experiments" / "models" / f"{args.model}.yaml")]
    given += ["--config", str(ROOT / "experiments" / "methods" / "qtale.yaml")]
    given += ["--model.path", str(weights), "--model.train_all", "false", "--out", str(out)]
    given += ["--data.tasks", "facts", "--data.batch_size", "1", "--data.limit_train", "64"]
    given += ["--data.limit_validation", "1", "--data.calibration_rows", "1", "--validations", "1"]
    given += ["--trainer.max_steps", "1", "--trainer.accumulate_grad_batches", "1"]
    given += ["--trainer.accelerator", "cpu", "--wandb", "disabled", "--sweep.thresholds", "[0.5]"]
    return [*given, "--quantize.bits", "[4]", "--quantize.engine", args.engine, "--quantize.sequences", "32"]


class Watch:
    """A process's most memory and seconds in each stage, by what is in its run's folder.

    Attributes:
        resident: Bytes in memory, by stage: weights that are read from a file in place among them.
        anonymous: Those of no file.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", run: Path, packed: Path) -> None:
        self._process, self._run, self._packed = process, run, packed
        self.anonymous, self.resident, self.seconds = (dict.fromkeys(STAGES, 0.0) for _ in range(3))
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def wait(self) -> int:
        """The process's exit status, after its end."""
        status = self._process.wait()
        self._thread.join()
        return status

    def _look(self) -> None:
        before, last = time.perf_counter(), STAGES[0]
        while self._process.poll() is None:
            stage, memory = self._stage(), _memory(self._process.pid)
            if stage != last:
                _forget_peak(self._process.pid)
                memory, last = _memory(self._process.pid), stage
            self.anonymous[stage] = max(self.anonymous[stage], memory.get("RssAnon", 0.0))
            self.resident[stage] = max(self.resident[stage], memory.get("VmHWM", 0.0))
            time.sleep(SECONDS_BETWEEN)
            self.seconds[stage] += time.perf_counter() - before
            before = time.perf_counter()

    def _stage(self) -> str:
        if self._packed.is_dir():
            return "score"
        if (self._run / "model").is_dir():
            return "quantize"
        results = self._run / "results.json"  # replaced as a whole, never half-written
        trained = results.is_file() and json.loads(results.read_text(encoding="utf-8")).get("train")
        return "export" if trained else "train"


def _forget_peak(process: int) -> None:
    """Have Linux count a process's largest resident size anew."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{process}/clear_refs").write_text("5", encoding="utf-8")


def _memory(process: int) -> dict[str, float]:
    """Fields of a process's status that are numbers of bytes; empty when it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = (line.split() for line in lines if line.endswith("kB"))
    return {name.rstrip(":"): 1024.0 * int(number) for name, number, _ in fields}


def rows_of(watch: Watch, planned: dict[str, float]) -> Iterator[dict[str, Any]]:
    """A row a stage."""
    for stage in STAGES:
        said = planned.get(stage)
        yield {
            "stage": stage,
            "seconds": watch.seconds[stage],
            "GiB": watch.resident[stage] / GIB,
            "of no file": watch.anonymous[stage] / GIB,
            "plan": None if said is None else said / GIB,
            "plan / measured": None if said is None else said / max(1.0, watch.resident[stage]),
        }


def measure(args: Any, folder: Path) -> None:
    """Make the weights, run, and report."""
    weights, out = folder / "weights", folder / "runs"
    if not (weights / "model.safetensors.index.json").is_file():
        write_weights(args.model, weights)
        give_back()
    given = options(args, weights, out)
    planned = PlannedRun(given, "real_size")
    width = 2 if str(args.precision).startswith("bf16") else 4
    needed = {"train": training_bytes(planned, width), "quantize": quantizing_bytes(planned, width)}
    said = {stage: bytes_ + PROCESS for stage, bytes_ in needed.items()}
    given += ["--trainer.precision", args.precision]
    command = [sys.executable, "-m", "qtale_lightning", "fit", *given]
    run = out / f"{args.model}-qtale-facts-s0"
    with (folder / "fit.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        watch = Watch(process, run, run / f"model-{args.engine.replace('native', 'awq')}-4bit")
        status = watch.wait()
    rows = [*rows_of(watch, said)]
    for row in rows:
        show(row)
    if status:
        tail = (folder / "fit.log").read_text(encoding="utf-8", errors="replace")[-3000:]
        raise SystemExit(f"fit ended with status {status}:\n{tail}")
    claims = []
    for row in rows:
        if (ratio := row["plan / measured"]) is not None:
            claims.append(
                claim(f"plan's memory to {row['stage']} over what was measured", ratio, 0.9, "higher")
            )
            claims.append(
                claim(f"plan's memory to {row['stage']} over what was measured", ratio, 1.1, "lower")
            )
    claims.append(claim("GiB at most", max(row["GiB"] for row in rows), 24, "lower"))
    report("real_size", rows, claims, args.json)


def main() -> None:
    """The command."""
    made = parser(__doc__)
    made.add_argument("--model", default="llama2-7b")
    made.add_argument("--engine", default="rtn", help="of quantization")
    made.add_argument("--precision", default="bf16-mixed", help="of training, and of what is exported")
    made.add_argument("--folder", type=Path, help="where weights and run go; by default the temporary folder")
    made.add_argument("--keep", action="store_true", help="leave the folder")
    args = made.parse_args()
    if args.quick:
        args.model = "tiny"
    if args.folder is None:
        with tempfile.TemporaryDirectory() as folder:
            measure(args, Path(folder))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    measure(args, args.folder)
    if not args.keep:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
