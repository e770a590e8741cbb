"""The bundle's wheels on a machine without a package index: those of packages that it lacks, unpacked into a folder."""

import hashlib
import shutil
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

BUNDLE = Path("dist") / "gpu-bundle"
ROWS = "rows"  # folder of a piece: the commonsense tasks' rows, where the bundle was given them


def wheels(root: Path) -> list[Path]:
    """Those beside this checkout (``dist/gpu-bundle/<piece>/wheels``), or around the copy that a piece holds."""
    return sorted(around(root).glob("*/wheels/*.whl"))


def around(root: Path) -> Path:
    """The folder of the pieces."""
    return root.parent.parent if root.parent.name.isdigit() else root / BUNDLE


def joined(root: Path, folder: Path) -> list[Path]:
    """Wheels that were too large for a piece, put together in a folder; those of which a part is missing aren't.

    Raises:
        ValueError: Parts don't make the wheel that was cut.
    """
    whole = []
    for first in sorted(around(root).glob("*/wheels/*.part1of*")):
        name, digest, _ = first.name.rsplit(".", 2)
        parts = sorted(around(root).glob(f"*/wheels/{name}.{digest}.part*"), key=_number)
        if len(parts) < int(first.name.rpartition("of")[2]) or installed(distribution(first)):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as file:
            for part in parts:
                file.write(part.read_bytes())
        if digest_of(folder / name) != digest:
            raise ValueError(
                f"the {len(parts)} parts of {name} don't make the wheel that was cut: copy them again"
            )
        whole.append(folder / name)
    return whole


def _number(part: Path) -> int:
    return int(part.name.rpartition(".part")[2].partition("of")[0])


def cut(wheel: Path, limit: int) -> list[Path]:
    """Cut a wheel into parts of so many bytes at most, beside it and in its place: ``<name>.<digest>.part1of2``, …"""
    content, digest = wheel.read_bytes(), digest_of(wheel)
    count = -(-len(content) // limit)
    size = -(-len(content) // count)
    parts = []
    for number in range(count):
        part = wheel.with_name(f"{wheel.name}.{digest}.part{number + 1}of{count}")
        part.write_bytes(content[number * size : (number + 1) * size])
        parts.append(part)
    wheel.unlink()
    return parts


def digest_of(file: Path) -> str:
    """The beginning of a file's SHA-256."""
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()[:16]


def distribution(wheel: Path) -> str:
    """The name that a wheel installs, as its file name spells it."""
    return wheel.name.split("-")[0]


def installed(name: str) -> bool:
    """Whether this interpreter has a package, in whatever version."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def missing(found: Iterable[Path]) -> list[Path]:
    """Wheels of packages that this interpreter lacks: what it has is used, whatever its version."""
    return [wheel for wheel in found if not installed(distribution(wheel))]


def unpack(found: Iterable[Path], site: Path) -> list[str]:
    """Unpack wheels into a folder for the PYTHONPATH; what pip would do, less scripts and bytecode.

    Returns:
        The names of what is there now.

    Raises:
        ValueError: A wheel is of another Python or processor.
    """
    from packaging.tags import sys_tags
    from packaging.utils import parse_wheel_filename

    here = frozenset(sys_tags())
    site.mkdir(parents=True, exist_ok=True)
    names = []
    for wheel in found:
        if not parse_wheel_filename(wheel.name)[3] & here:
            raise ValueError(
                f"{wheel} is of another Python or processor: make the bundle for this one (--python)"
            )
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        for part in ("purelib", "platlib"):  # of wheels that keep their modules aside
            for folder in site.glob(f"*.data/{part}"):
                shutil.copytree(folder, site, dirs_exist_ok=True)
        names.append(distribution(wheel))
    return names
