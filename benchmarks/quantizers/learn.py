"""AutoRound's own quantizer on a model and token rows from files, for peer.py: run by a Python that has auto-round.

    PYTHON benchmarks/quantizers/learn.py FOLDER ASKED

FOLDER holds the model, in Hugging Face's format, and `rows.json`, token rows of one length; ASKED is JSON, see peer.py.
It writes there what the quantized weights stand for (`<bits>bit.safetensors`), and then what was asked and what it took
(`<bits>bit.json`). It imports nothing of the suite: auto-round may want other versions of what both need.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

# What PyTorch compiles, as AutoRound has it do from 10 steps on, it compiles here, and not in further processes.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import torch
from auto_round import AutoRound, __version__
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Quantize and say what it took."""
    folder, asked = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(asked["threads"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    rows = torch.tensor(json.loads((folder / "rows.json").read_text(encoding="utf-8")))
    scheme = {"bits": asked["bits"], "group_size": asked["group_size"], "sym": False, "data_type": "int"}
    batch = asked["batch"]
    before, processor, started = most_memory(), processor_seconds(), time.perf_counter()
    rounder = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        scheme=scheme,
        dataset=[{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in rows.split(batch)],
        seqlen=rows.shape[1],
        nsamples=len(rows),
        batch_size=batch,
        iters=asked["steps"],
        device_map="cpu",
        seed=0,
    )
    quantized, _ = rounder.quantize()
    took = {
        "asked": asked,
        "seconds": time.perf_counter() - started,
        "processor": processor_seconds() - processor,
        "grown": most_memory() - before,
        "version": __version__,
    }
    weights = {name: tensor.detach().float().contiguous() for name, tensor in quantized.named_parameters()}
    layers = {name: tensor for name, tensor in weights.items() if name.endswith("_proj.weight")}
    save_file(layers, folder / f"{asked['bits']}bit.safetensors")
    (folder / f"{asked['bits']}bit.json").write_text(json.dumps(took), encoding="utf-8")


def most_memory() -> int:
    """The most bytes of memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def processor_seconds() -> float:
    """Of all threads, and of the compilers that were started."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    main()
