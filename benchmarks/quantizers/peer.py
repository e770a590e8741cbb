"""AutoRound's own quantizer, by a Python that has the package: what it finds is kept in a folder."""

import hashlib
import json
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from qtale_lightning.models.sources import load_base, load_tokenizer
from qtale_lightning.quantization.engines import find
from quantizers.cost import Cost

ROW = 64  # tokens of a row that it gets: it takes rows of one length


def check(python: str) -> None:
    """Refuses a Python that hasn't auto-round, before hours of other engines (ValueError)."""
    try:
        subprocess.run([python, "-c", "import auto_round"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"--auto-round {python}: it can't import auto_round; make an environment of its own and "
            "`pip install auto-round` there"
        ) from error


def auto_round(
    args: Namespace, number: int, sequences: Sequence[Sequence[int]], bits: int
) -> tuple[dict[str, Tensor], Cost]:
    """Its weights at a width, from a set's sequences end to end, and their cost: of the folder, or else it runs.

    Raises:
        ValueError: The folder holds what was asked for otherwise, or holds nothing and no Python is given.
    """
    folder = Path(args.peers) / f"set{number}"
    tokens = [token for sequence in sequences for token in sequence]
    rows = json.dumps([tokens[i : i + ROW] for i in range(0, len(tokens) - ROW + 1, ROW)])
    asked = {
        "model": args.model, "dtype": args.dtype, "bits": bits, "group_size": args.group_size,
        "batch": find("signround").options["batch"], "steps": args.steps, "threads": torch.get_num_threads(),
        "rows": hashlib.sha256(rows.encode()).hexdigest()[:16],
    }  # fmt: skip
    said = folder / f"{bits}bit.json"
    if not said.is_file():
        if not args.auto_round:
            raise ValueError(f"{said} isn't there yet: give --auto-round PYTHON")
        load_base(args.model, dtype=getattr(torch, args.dtype)).save_pretrained(folder)
        load_tokenizer(args.model).save_pretrained(folder)
        (folder / "rows.json").write_text(rows, encoding="utf-8")
        script = Path(__file__).parent / "learn.py"
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends what it computes, too
        try:
            subprocess.run([args.auto_round, script, folder, json.dumps(asked)], check=True)
        finally:
            signal.signal(signal.SIGTERM, before)
    took = json.loads(said.read_text(encoding="utf-8"))
    if took["asked"] != asked:
        raise ValueError(
            f"{said} was asked for {took['asked']}, not for {asked}: name another folder with --peers"
        )
    weights = load_file(folder / f"{bits}bit.safetensors")
    return weights, Cost(took["seconds"], took["processor"], took["grown"])
