"""Files of experiments/ and sweeps/: those of the folder that a command is started in, or else of the checkout."""

from pathlib import Path

CHECKOUT = Path(__file__).parent.parent
FOLDERS = ("experiments", "sweeps")


def find(path: str | Path) -> Path:
    """A path as given, or the checkout's where it names a file of these folders and isn't there."""
    given = Path(path).expanduser()
    ours = CHECKOUT / given
    return (
        ours
        if given.parts[:1] in {(name,) for name in FOLDERS} and not given.exists() and ours.exists()
        else given
    )


def names(folder: str) -> list[str]:
    """Names of the YAML files in a folder of ``experiments/``, of both places."""
    places = (Path("experiments"), CHECKOUT / "experiments")
    return sorted({file.stem for place in places for file in (place / folder).glob("*.yaml")})
