"""The bundle's wheels on a machine without a package index: those of packages that it lacks, unpacked into a folder."""

import shutil
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

BUNDLE = Path("dist") / "gpu-bundle"


def wheels(root: Path) -> list[Path]:
    """Those beside this checkout (``dist/gpu-bundle/<piece>/wheels``), or around the copy that a piece holds."""
    around = root.parent.parent if root.parent.name.isdigit() else root / BUNDLE
    return sorted(around.glob("*/wheels/*.whl"))


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
