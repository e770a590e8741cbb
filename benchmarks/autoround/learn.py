"""AutoRound's own quantizer on a model and token rows from files, for quantize.py: run by a Python that has auto-round.

    PYTHON benchmarks/autoround/learn.py FOLDER BITS GROUP_SIZE BATCH STEPS

FOLDER holds the model, in Hugging Face's format, and `rows.json`, token rows of one length. It writes there what the
quantized weights stand for (`<bits>bit.safetensors`), and then its seconds and the growth of its memory
(`<bits>bit.json`). It imports nothing of the suite: auto-round may want other versions of what both need.
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from auto_round import AutoRound, __version__
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Quantize and say what it took."""
    folder, (bits, group_size, batch, steps) = Path(sys.argv[1]), map(int, sys.argv[2:6])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    rows = torch.tensor(json.loads((folder / "rows.json").read_text(encoding="utf-8")))
    scheme = {"bits": bits, "group_size": group_size, "sym": False, "data_type": "int"}
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    rounder = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        scheme=scheme,
        dataset=[{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in rows.split(batch)],
        seqlen=rows.shape[1],
        nsamples=len(rows),
        batch_size=batch,
        iters=steps,
        device_map="cpu",
        seed=0,
    )
    quantized, _ = rounder.quantize()
    seconds = time.perf_counter() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    weights = {name: tensor.detach().float().contiguous() for name, tensor in quantized.named_parameters()}
    layers = {name: tensor for name, tensor in weights.items() if name.endswith("_proj.weight")}
    save_file(layers, folder / f"{bits}bit.safetensors")
    took = {"seconds": seconds, "grown": grown, "version": __version__, "threads": torch.get_num_threads()}
    (folder / f"{bits}bit.json").write_text(json.dumps(took), encoding="utf-8")


if __name__ == "__main__":
    main()
