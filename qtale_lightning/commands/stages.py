"""The commands on finished runs. Each has the run's directory for itself while it works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt

from qtale_lightning.bits_schedule import Schedule
from qtale_lightning.commands.parser import PROG
from qtale_lightning.routing.perturbation import Perturbation, perturb
from qtale_lightning.run import RunDirectory
from qtale_lightning.values import (
    BatchSize,
    Bits,
    Floats,
    NonNegative,
    Numbers,
    Positive,
    ShareAboveZero,
    UserPath,
)

if TYPE_CHECKING:
    from qtale_lightning.cli import QTALECLI


@contextmanager
def _opened(run: str, command: str) -> Iterator[RunDirectory]:
    """A run's directory, which the command has for itself meanwhile (FileNotFoundError: it is none)."""
    directory = RunDirectory(run)
    if not directory.config.is_file():
        directory.require_config()  # which says what is wrong
    with directory.locked(command):
        directory.require_config()
        yield directory


@contextmanager
def _configured(run: str, options: tuple[str, ...], command: str) -> Iterator[tuple[RunDirectory, QTALECLI]]:
    """A run's directory, and its configuration with options that override it."""
    with _opened(run, command) as directory:
        from qtale_lightning.cli import QTALECLI

        given = ["--config", str(directory.config), *options]
        yield directory, QTALECLI(given, f"{PROG} {command} {run}")


def quantize(run: UserPath, options: tuple[str, ...]) -> None:
    """A finished run at each of --quantize.bits, by --quantize.engine.

    Args:
        run: A run's directory.
    """
    with _configured(run, options, "quantize") as (directory, cli):
        from qtale_lightning import stages

        if not cli.quantization.bits:
            raise ValueError("--quantize.bits is empty, so nothing is to be quantized: give bits such as 4,3")
        cli.check()
        data = cli.prepare_data()
        cli.check_calibration()
        stages.quantize(directory, data, cli.quantization)


def thresholds(
    run: UserPath,
    options: tuple[str, ...],
    noise: NonNegative = 0.0,
    random_gates: ClosedUnitInterval = 0.0,
    random_ratio: ShareAboveZero | None = None,
    draw: NonNegativeInt = 0,
) -> None:
    """Accuracy and cost over θ at each precision that is there, and θ by --sweep.rule.

    The rule chooses from the grid --sweep.thresholds, or searches θ for each of --sweep.budgets.

    Args:
        run: A run's directory.
        noise: Perturbs decisions: so many times a draw of Gumbel noise on each of a router's logits; 1 is training's.
        random_gates: Perturbs decisions: the share of them that random ones take the place of.
        random_ratio: Share of all layers that random gates alone would execute.
        draw: Number of the draw of noise and random gates.
    """
    perturbation = Perturbation(noise, random_gates, random_ratio, draw)
    with _configured(run, options, "thresholds") as (directory, cli):
        from qtale_lightning import stages
        from qtale_lightning.evaluation.budget import UnmetBudgetError
        from qtale_lightning.report import write_report

        quantization, data = cli.quantization, cli.prepare_data()
        try:
            stages.sweep(directory, data, quantization.bits, quantization.engine, cli.sweep, perturbation)
        except UnmetBudgetError:  # said last, behind the report of all that was met
            write_report(directory.root)
            raise
        write_report(directory.root)


def evaluate(
    run: UserPath,
    options: tuple[str, ...],
    bits: Bits = 16,
    theta: Floats[ClosedUnitInterval] | None = None,
    activation_bits: Literal[16, 8] = 16,
    head_bits: Literal[16, 8, 4] = 16,
    noise: NonNegative = 0.0,
    random_gates: ClosedUnitInterval = 0.0,
    random_ratio: ShareAboveZero | None = None,
    draw: NonNegativeInt = 0,
    bits_schedule: str | None = None,
) -> None:
    """One precision and threshold on the validation questions.

    Args:
        run: A run's directory.
        bits: Precision, of those that the run has by --quantize.engine (by default its own).
        theta: Threshold, or one for each routed layer; by default the model's own.
        activation_bits: Of tokens in products with quantized weights: 8 rounds them, in blocks of 32.
        head_bits: Of the head's weights: 8 and 4 round them to nearest, in groups of 32.
        noise: Perturbs decisions: so many times a draw of Gumbel noise on each of a router's logits; 1 is training's.
        random_gates: Perturbs decisions: the share of them that random ones take the place of.
        random_ratio: Share of all layers that random gates alone would execute.
        draw: Number of the draw of noise and random gates.
        bits_schedule: Precisions of answers in writing by tokens written, of an engine whose codes are nested: 0:4,32:3
            writes at 4 bits until there are 32 tokens, then at 3; a third number is θ from there on; --bits is 4 then.
    """
    perturbation = Perturbation(noise, random_gates, random_ratio, draw)
    schedule = None if bits_schedule is None else Schedule.read(bits_schedule)
    if schedule is not None and bits not in (16, schedule[0].bits):
        raise ValueError(
            f"--bits {bits:g}, but the schedule {schedule} begins with {schedule[0].bits}: leave --bits out"
        )
    bits = bits if schedule is None else schedule[0].bits
    with _configured(run, options, "evaluate") as (directory, cli):
        if schedule is not None:
            cli.datamodule.asking.check_written(str(schedule))
        from qtale_lightning import stages
        from qtale_lightning.quantization.lighter import lighten

        engine = cli.quantization.engine
        model = stages.load_exported(directory, bits, engine, schedule=schedule)
        lighten(model, activation_bits, head_bits)
        perturb(model, perturbation)
        at: float | list[float] | None = None
        if model.config.has_theta:
            given = None if theta is None else [*theta]
            at = model.config.threshold if given is None else given[0] if len(given) == 1 else given
            model.config.thresholds(at)  # refuses a wrong number of them
        elif theta is not None:
            raise ValueError(f"{run} has no θ, by its method {cli.model.method}: leave --theta out")
        stages.evaluate(directory, cli.prepare_data(), model, bits, engine, at, "validation")


def lm_eval(
    run: UserPath,
    options: tuple[str, ...],
    tasks: str | None = None,
    bits: Bits = 16,
    theta: ClosedUnitInterval | None = None,
    limit: PositiveInt | None = None,
    batch_size: BatchSize | None = None,
) -> None:
    """One precision and threshold by lm-evaluation-harness, unmodified: its own tasks, or local rows.

    Args:
        run: A run's directory.
        tasks: Tasks joined by commas, ours or the harness's; by default the run's.
        bits: Precision, of those that the run has by --quantize.engine (by default its own).
        theta: Threshold; by default the model's own.
        limit: Questions of each task, the first ones; by default all.
        batch_size: Requests in a batch, or auto; by default 8 on a CPU, else auto.
    """
    with _configured(run, options, "lm-eval") as (directory, cli):
        from qtale_lightning import harness

        data, engine = cli.datamodule, cli.quantization.engine
        names = tasks.split(",") if tasks else data.tasks
        harness.lm_eval(directory, data, names, bits, engine, theta, limit, batch_size)


def inspect(
    run: UserPath,
    options: tuple[str, ...],
    bits: Numbers[Positive] | None = None,
    theta: ClosedUnitInterval | None = None,
    questions: PositiveInt = 200,
    text: list[str] | None = None,
) -> None:
    """A page that shows which layers each token executes, and what quantization changes of them.

    Args:
        run: A run's directory.
        bits: Precisions beside 16; by default all that --quantize.engine has made.
        theta: Threshold of all precisions; by default the model's own.
        questions: Validation questions to measure changes on.
        text: A text of your own instead of validation questions; give it once for each.
    """
    with _configured(run, options, "inspect") as (directory, cli):
        from qtale_lightning import stages

        texts = (
            stages.own_texts(directory, text)
            if text
            else stages.question_texts(cli.prepare_data(), questions)
        )
        engine = cli.quantization.engine
        print(stages.inspect(directory, bits, engine, theta, texts, measured=not text))


def report(run: UserPath) -> None:
    """Figures, results.md and the summary, from results.json.

    Args:
        run: A run's directory.
    """
    with _opened(run, "report") as directory:
        from qtale_lightning.report import write_report

        directory.merge_logs()
        write_report(directory.root)


def compare(runs: list[UserPath], *, to: UserPath) -> None:
    """Several runs of one protocol in one table and figure.

    Args:
        runs: Runs' directories.
        to: The folder that the comparison goes to.
    """
    from rich.console import Console

    from qtale_lightning.report.compare import compare as compare_runs
    from qtale_lightning.report.terminal import print_page

    print_page(compare_runs(runs, to).read_text(encoding="utf-8"), Console())
