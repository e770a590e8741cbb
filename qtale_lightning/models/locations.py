"""Where a model lies: in a folder, in an installed package, or in a repository of the hub at one commit."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qtale_lightning.architectures import KnownModel, known_model
from qtale_lightning.hub.repository import Repository
from qtale_lightning.models.packages import gguf_folder, installed, package_folder, to_install

# What is read of a repository. Weights that are pickled, or saved a second time under another name, stay on the hub.
CONFIG = ("config.json",)
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
WEIGHTS = (
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
)


class ModelUnavailableError(OSError):
    """A model can't be had here; the message says what to do."""


@dataclass(frozen=True)
class Location:
    """A folder of this machine, or a repository of the hub at a commit, branch or tag.

    Attributes:
        folder: None where it is on the hub.
        hub: ``owner/name``.
        revision: Of the repository.
        wanted, otherwise: As `hub.Repository` has them.
        packaged: The model whose installed package, at the folder, holds it.
    """

    folder: Path | None = None
    hub: str = ""
    revision: str | None = None
    wanted: str = ""
    otherwise: str = ""
    packaged: KnownModel | None = None

    @property
    def gguf(self) -> str | None:
        """The package's file."""
        return self.packaged.package[1] if self.packaged is not None and self.packaged.package else None

    @property
    def options(self) -> dict[str, Any]:
        """For ``from_pretrained``; the network is never asked there."""
        return {"local_files_only": True, **({"gguf_file": self.gguf} if self.gguf else {})}

    def commit(self) -> str | None:
        """The commit that the revision stands for; None for a folder.

        Raises:
            HubError: It can't be looked up; the message says what to do.
        """
        if self.folder is not None:
            return None
        from qtale_lightning.hub.download import resolve  # here, since a folder needs no hub

        return resolve(self._repository())

    def get(self, *files: str) -> Path:
        """The folder with the files, which are downloaded first where they have to be.

        Raises:
            HubError: They can't be had; the message says what to do.
            ModelUnavailableError: They are in an installed package, which is damaged, or whose parts find no room.
        """
        if self.packaged is not None:
            with self.loading():
                return gguf_folder(self.packaged)
        if self.folder is not None:
            return self.folder
        from qtale_lightning.hub.download import resolve, snapshot

        repository = self._repository()
        return snapshot(replace(repository, revision=resolve(repository)), files)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Say in one paragraph what is wrong with a model's files.

        Raises:
            ModelUnavailableError: Instead of what their readers raise.
        """
        try:
            yield
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ModelUnavailableError(f"the model of {self} can't be loaded: {reason}") from error

    def _repository(self) -> Repository:
        revision = self.revision or "main"
        return Repository(self.hub, "model", revision, self.wanted, self.otherwise, "--model.revision")

    def __str__(self) -> str:
        if self.folder is None:
            return f"{self.hub} at {self.revision or 'main'}"
        return f"{self.folder.name} package, {self.gguf}, dequantized" if self.gguf else str(self.folder)


def locate(name: str, path: str | None = None, revision: str | None = None) -> Location | None:
    """Where a model is; None if it is made on the spot.

    Args:
        name: One of `architectures`.
        path: A folder or hub id, instead of the model's own source.
        revision: Of the hub's repository; None is the model's own commit, or main with a path.

    Raises:
        ModelUnavailableError: There is no such folder.
        ValueError: An unknown model, or a revision of what has none.
    """
    _, known = known_model(name)
    folder = None if path is None else Path(path).expanduser()
    if folder is None and revision is None and installed(known):
        return Location(package_folder(known), packaged=known)
    if folder is None and known.hub is None:
        if revision is not None:
            raise ValueError(f"--model.revision {revision}: {name} is made on the spot; leave it out")
        return None
    if folder is not None and folder.is_dir():
        if revision is not None:
            raise ValueError(f"--model.revision {revision}: {path} is a folder, which has none; leave it out")
        return Location(folder)
    if path is not None and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ModelUnavailableError(
            f"--model.path {path}: there is no such folder; give a model's folder or a hub id"
        )
    otherwise = "Or, if the model is on your disk, give its folder with --model.path."
    if known.package is not None:
        otherwise += f" Or install the package that carries it: `{to_install(known)}`."
    return Location(
        hub=path or known.hub or "",
        revision=known_commit(name, path, revision),
        wanted=f"the model {name!r}" + (f" (--model.path {path})" if path else ""),
        otherwise=otherwise,
    )


def known_commit(name: str, path: str | None = None, revision: str | None = None) -> str | None:
    """What ``revision`` says or the model's declaration pins, as far as it's known without asking anyone."""
    _, known = known_model(name)
    if path is not None or revision is not None:
        return revision
    return None if installed(known) else known.revision


def find_commit(name: str, path: str | None = None, revision: str | None = None) -> str | None:
    """The commit that a model of the hub is read at; None for what has none. A branch or tag is looked up.

    Raises:
        HubError: It can't be had; the message says what to do.
        ModelUnavailableError, ValueError: as :func:`locate`.
    """
    location = locate(name, path, revision)
    return None if location is None else location.commit()


def source_name(name: str, path: str | None, revision: str | None = None) -> str:
    """In words, where :func:`load_base` takes the weights from; recorded with every result."""
    return str(locate(name, path, revision) or "random initialisation")
