"""``fit --help`` says what every option of the suite does."""

import inspect
import re
from collections.abc import Callable

import pytest

from qtale_lightning.__main__ import main
from qtale_lightning.commands import COMMANDS
from qtale_lightning.data.settings import DataSettings
from qtale_lightning.evaluation.options import SweepOptions
from qtale_lightning.quantization.options import QuantizationOptions
from qtale_lightning.settings import ModelSettings

SECTIONS: dict[str, Callable[..., object]] = {
    "model": ModelSettings,
    "data": DataSettings,
    "quantize": QuantizationOptions,
    "sweep": SweepOptions,
}
OWN = ("out", "ckpt_path", "validations", "wandb", "wandb_project")
OPTIONS = [
    *(
        f"{section}.{name}"
        for section, cls in SECTIONS.items()
        for name in inspect.signature(cls).parameters
        if name != "seed"  # --seed_everything sets it, for model and data alike
    ),
    *OWN,
]


@pytest.fixture(scope="module")
def descriptions() -> dict[str, str]:
    """Option → its description in the help text, without type and default."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:  # noqa: PT012
        patch.setenv("COLUMNS", "200")
        lines: list[str] = []
        patch.setattr("sys.stdout.write", lines.append)
        main(["fit", "--help"])
    assert end.value.code == 0
    text = "".join(lines)
    entries = re.split(r"^  (?=-|\w)", text[text.index("The run:") :], flags=re.MULTILINE)
    found = {}
    for entry in entries:
        if match := re.match(r"--([\w.]+)(?: (?:\{[^}]*\}|\[[^\]]*\]|\S+))?\s+(.*)", entry, flags=re.DOTALL):
            found[match[1]] = re.sub(r"\s+", " ", re.split(r"\((?:required, )?type:", match[2])[0]).strip()
    return found


@pytest.mark.parametrize("option", OPTIONS)
def test_option_is_described(option: str, descriptions: dict[str, str]) -> None:
    assert option in descriptions
    assert len(descriptions[option].split()) >= 2, f"--{option} has no description"


def test_usage_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    usage = capsys.readouterr().out
    assert all(re.search(rf"^ +{command} ", usage, flags=re.MULTILINE) for command in COMMANDS.commands)
