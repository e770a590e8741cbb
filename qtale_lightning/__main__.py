"""The command line: ``python -m qtale_lightning fit|plan|quantize|sweep|evaluate|…``; :data:`USAGE` lists all."""

from __future__ import annotations

import argparse
import logging
import math
import shlex
import signal
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING

from qtale_lightning import errors

# Importing PyTorch, Lightning and transformers takes seconds: every command imports what it needs when it runs.
if TYPE_CHECKING:
    from qtale_lightning.cli import QTALECLI
    from qtale_lightning.run import RunDirectory

USAGE = """usage: python -m qtale_lightning <command> …

  fit --config FILE … [OPTIONS]     train, then export, quantize, sweep and report; resumes an interrupted run
  plan --config FILE … [OPTIONS]    what fit would cost, without loading weights
  quantize RUN [OPTIONS]            a finished run at each of --quantize.bits, by --quantize.engine
  sweep RUN [OPTIONS]               accuracy and cost at each precision, and θ by --sweep.rule: from the grid
                                    --sweep.thresholds, or for each of --sweep.budgets
  evaluate RUN [--bits N] [--theta X …] [OPTIONS]
                                    one precision and threshold on the validation questions
  lm-eval RUN [--tasks NAMES] [--bits N] [--theta X] [--limit N] [--batch-size N] [OPTIONS]
                                    the same by lm-evaluation-harness, unmodified: its own tasks or local rows
  inspect RUN [--bits N …] [--theta X] [--questions N] [--text TEXT]
                                    a page that shows which layers each token executes, at each precision
  report RUN                        figures, results.md and the summary, from results.json
  compare RUN RUN … --to FOLDER     several runs of one protocol in one table and figure
  table NAME --model MODEL [--data TASKS] [--seeds 0,1] [--out FOLDER] [--plan] [OPTIONS]
                                    a declared table: what is missing is run, what is there is used again
  figures NAME --model MODEL …      figures of a table's finished runs
  doctor [--model MODEL] [--out FOLDER] [OPTIONS]
                                    what this machine has of what is needed, and what a model would lack here

Every option of a run is shown by `fit --help`; RUN is a run's directory, and options override its configuration.
With --debug, an error shows where it was raised.
"""


def fit(args: list[str]) -> None:
    """Train and everything after it."""
    from qtale_lightning.cli import QTALECLI

    cli = QTALECLI(args, "python -m qtale_lightning fit")
    cli.check()
    cli.check_training()
    cli.pin_base()
    cli.check_base()
    with cli.run.locked("fit"):
        _fit(cli, args)


def _fit(cli: QTALECLI, args: list[str]) -> None:
    """What `fit` does in the run's directory."""
    import yaml
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from qtale_lightning.checkpoints import resume_point
    from qtale_lightning.locks import is_helper
    from qtale_lightning.models.sources import source_name
    from qtale_lightning.precision import remark
    from qtale_lightning.results import update_results
    from qtale_lightning.results.metadata import run_metadata
    from qtale_lightning.results.origin import origin
    from qtale_lightning.results.store import load_or_new

    run, data = cli.run, cli.prepare_data()
    cli.check_rows()
    checkpoint = cli.config["ckpt_path"]
    if checkpoint in (None, "last"):
        found = resume_point(run) or (run.last if checkpoint else None)
        checkpoint = found and str(found)
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise FileNotFoundError(
            f"nothing to resume from: {checkpoint} isn't there. Leave --ckpt_path out to start."
        )
    trainer = cli.make_trainer()
    made_from = origin(yaml.safe_load(cli.config_text())) | {"rows": data.digests()}
    known = load_or_new(run.root).get("run", {}).get("made_from")
    first = not is_helper()
    (run.claim if first else run.check_claim)(cli.config_text(), made_from, known)
    command = shlex.join(["python", "-m", "qtale_lightning", "fit", *args])
    seed = cli.model.seed
    source = source_name(cli.model.name, cli.model.path, cli.model.revision)
    metadata = run_metadata(cli.model.name, cli.model.method, data.label, seed, command, source)
    precision = str(cli.config["trainer"]["precision"])
    if first:
        update_results(run.root, "run", metadata | {"precision": precision, "made_from": made_from})
        run.list_logs()
    if said := remark(precision, cli.config["trainer"]["accelerator"], cli.precision_origin):
        errors.say(said)
    if checkpoint is not None:
        errors.say(f"resuming from {checkpoint}")
    cli.start_logging(trainer)
    try:
        trainer.fit(cli.model, cli.datamodule, ckpt_path=checkpoint, weights_only=True)
    except SIGTERMException:  # Lightning's own exit status for it is 0, and a scheduler requeues what failed
        errors.say(f"stopped by SIGTERM; the same command resumes from {run.last}")
        raise SystemExit(128 + signal.SIGTERM) from None
    except SystemExit:  # how Lightning ends a run that Ctrl-C has stopped
        raise KeyboardInterrupt from None
    if first:
        run.list_logs()


def plan(args: list[str]) -> None:
    """Print what a run would cost."""
    from qtale_lightning.configuration import PlannedRun
    from qtale_lightning.plan import print_plan

    run = PlannedRun(args, "python -m qtale_lightning plan")
    run.check()
    run.check_training()
    print_plan(run)


def _alone(command: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """A command that writes into a run's directory, which it has for itself meanwhile."""

    @wraps(command)
    def run_alone(args: list[str]) -> None:
        args = [*map(expanduser, args[:1]), *args[1:]]
        if {"-h", "--help"} & {*args} or not args or not Path(args[0], "config.yaml").is_file():
            return command(args)  # which says what is wrong, or how it is called

        from qtale_lightning.run import RunDirectory

        with RunDirectory(args[0]).locked(command.__name__.replace("_", "-")):
            return command(args)

    return run_alone


@_alone
def quantize(args: list[str]) -> None:
    """AWQ of a finished run."""
    run, _, options = _parsed(_of_a_run("quantize", section="quantize"), args)

    from qtale_lightning import stages

    cli = _configured(run, options, "quantize")
    cli.check()
    data = cli.prepare_data()
    cli.check_calibration()
    stages.quantize(run, data, cli.quantization)


@_alone
def sweep(args: list[str]) -> None:
    """Sweep the precisions that are there over θ."""
    run, _, options = _parsed(_of_a_run("sweep", section="sweep"), args)

    from qtale_lightning import stages
    from qtale_lightning.report import write_report

    cli = _configured(run, options, "sweep")
    quantization = cli.quantization
    stages.sweep(run, cli.prepare_data(), quantization.bits, quantization.engine, cli.sweep)
    write_report(run.root)


@_alone
def evaluate(args: list[str]) -> None:
    """One precision and θ on the validation questions."""
    parser = _of_a_run("evaluate")
    parser.add_argument("--bits", type=_bits, default=16, help="precision, of those that the run has")
    parser.add_argument(
        "--theta",
        type=_probability,
        nargs="+",
        help="threshold, or one for each routed layer; by default the model's own",
    )
    run, own, options = _parsed(parser, args)

    from qtale_lightning import stages

    cli = _configured(run, options, "evaluate")
    engine = cli.quantization.engine
    model = stages.load_exported(run, own.bits, engine)
    if model.config.routed_layers:
        theta = model.config.threshold if own.theta is None else own.theta
        if isinstance(theta, list) and len(theta) == 1:
            theta = theta[0]
        model.config.thresholds(theta)  # refuses a wrong number of them
    elif own.theta is not None:
        raise ValueError(f"{run.root} has no routers: leave --theta out")
    else:
        theta = None
    data = cli.prepare_data()
    stages.evaluate(run, data, model, own.bits, engine, theta, "validation")


@_alone
def lm_eval(args: list[str]) -> None:
    """One precision and θ by lm-evaluation-harness."""
    parser = _of_a_run("lm-eval")
    parser.add_argument("--tasks", help="tasks joined by commas, ours or the harness's; by default the run's")
    parser.add_argument("--bits", type=_bits, default=16, help="precision, of those that the run has")
    parser.add_argument("--theta", type=_probability, help="threshold; by default the model's own")
    parser.add_argument("--limit", type=_count, help="questions of each task, the first ones; by default all")
    parser.add_argument(
        "--batch-size", type=_batch, help="requests in a batch, or auto; by default 8 on a CPU, else auto"
    )
    run, own, options = _parsed(parser, args)

    from qtale_lightning import harness

    cli = _configured(run, options, "lm-eval")
    harness.lm_eval(
        run,
        cli.datamodule,
        own.tasks.split(",") if own.tasks else cli.datamodule.tasks,
        own.bits,
        cli.quantization.engine,
        own.theta,
        own.limit,
        own.batch_size,
    )


@_alone
def inspect(args: list[str]) -> None:
    """A page of the layers that each token executes, and what quantization changes of them."""
    parser = _of_a_run("inspect")
    parser.add_argument(
        "--bits", type=_bits, nargs="+", help="precisions beside 16; by default all there are"
    )
    parser.add_argument(
        "--theta", type=_probability, help="threshold of all precisions; by default the model's own"
    )
    parser.add_argument(
        "--questions", type=_count, default=200, help="validation questions to measure changes on"
    )
    parser.add_argument("--text", action="append", help="a text of your own, instead of validation questions")
    run, own, options = _parsed(parser, args)

    from qtale_lightning import stages

    cli = _configured(run, options, "inspect")
    texts = (
        stages.own_texts(run, own.text)
        if own.text
        else stages.question_texts(cli.prepare_data(), own.questions)
    )
    engine = cli.quantization.engine
    print(stages.inspect(run, own.bits, engine, own.theta, texts, measured=not own.text))


@_alone
def report(args: list[str]) -> None:
    """Everything that is shown, from results.json."""
    run, _, options = _parsed(_of_a_run("report", overridable=False), args)
    if options:
        raise ValueError(f"report takes a run and no options, not {' '.join(options)}")

    from qtale_lightning.report import write_report

    run.require_config()
    run.merge_logs()
    write_report(run.root)


def compare(args: list[str]) -> None:
    """Several runs in one table and figure."""
    parser = _parser("compare")
    parser.add_argument("runs", metavar="RUN", type=expanduser, nargs="+", help="runs' directories")
    parser.add_argument(
        "--to",
        metavar="FOLDER",
        type=expanduser,
        required=True,
        help="the folder that the comparison goes to",
    )
    own = parser.parse_args(args)

    from rich.console import Console

    from qtale_lightning.report.compare import compare as compare_runs
    from qtale_lightning.report.terminal import print_page

    print_page(compare_runs(own.runs, own.to).read_text(encoding="utf-8"), Console())


def table(args: list[str]) -> None:
    """A declared table, and the runs that it is missing."""
    from qtale_lightning.tables.request import parse

    parse("table", args)  # help and mistakes come before seconds of imports

    from qtale_lightning.tables.command import table

    table(args)


def doctor(args: list[str]) -> int:
    """What this machine has of what is needed, and what a model would lack here."""
    from qtale_lightning.doctor import doctor as examine

    return examine(args)


def figures(args: list[str]) -> None:
    """Figures of a declared table's runs."""
    from qtale_lightning.tables.request import parse

    parse("figures", args)  # help and mistakes come before seconds of imports

    from qtale_lightning.tables.command import figures

    figures(args)


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    command.__name__.replace("_", "-"): command
    for command in (
        fit,
        plan,
        quantize,
        sweep,
        evaluate,
        lm_eval,
        inspect,
        report,
        compare,
        table,
        figures,
        doctor,
    )
}

# Commands that, stopped and given again, go on where they were.
GOES_ON = {"fit", "quantize", "sweep", "table"}


def _parser(command: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """The parser of a command's own options."""
    return argparse.ArgumentParser(
        f"python -m qtale_lightning {command}",
        description=COMMANDS[command].__doc__,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _of_a_run(command: str, overridable: bool = True, section: str = "") -> argparse.ArgumentParser:
    """The parser of a command on a run's directory.

    Args:
        command: Its name.
        overridable: Whether it takes options of `fit`.
        section: Those of them that its help shows.
    """
    others = "Other options override the run's configuration: `fit --help` lists them."
    if section:
        from qtale_lightning.configuration import section_help

        others = f"{section_help(section)}\n{others}"
    parser = _parser(command, others if overridable else None)
    parser.add_argument("run", metavar="RUN", help="a run's directory")
    return parser


def _parsed(
    parser: argparse.ArgumentParser, args: list[str]
) -> tuple[RunDirectory, argparse.Namespace, list[str]]:
    """The run that a command names, the command's own options, and those that override the configuration."""
    if args and args[0].startswith("-") and not {"-h", "--help"} & {*args}:
        parser.error("name the RUN first, and options behind it")
    own, options = parser.parse_known_args(args)

    from qtale_lightning.run import RunDirectory

    return RunDirectory(own.run), own, options


def _configured(run: RunDirectory, options: list[str], command: str) -> QTALECLI:
    """The run's configuration with overriding options."""
    from qtale_lightning.cli import QTALECLI

    return QTALECLI(
        ["--config", str(run.require_config()), *options], f"python -m qtale_lightning {command} {run.root}"
    )


def _bits(text: str) -> float:
    """A precision: whole where it is."""
    bits = float(text)
    if not 0 < bits < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of bits")
    return int(bits) if bits.is_integer() else bits


def _count(text: str) -> int:
    """A number of things, at least one."""
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be positive")
    return count


def _batch(text: str) -> str:
    """A batch's size as lm-evaluation-harness takes it."""
    return text if text.startswith("auto") else str(_count(text))


def _probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a probability: give a value in [0, 1]")
    return value


def _configure() -> None:
    """Logs, warnings and memory of a command's process."""
    from qtale_lightning.allocator import keep_freed_memory

    # Plain lines, which no width breaks: commands and paths in them are there to be copied.
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("qtale_lightning").setLevel(logging.INFO)
    # Not for the user: batches of a few kilobytes need no workers, a resumed run's folder isn't empty, and Lightning's
    # own use of torch is Lightning's concern.
    for message in (".*does not have many workers", ".*exists and is not empty", ".*treespec, LeafSpec"):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # it is given what argv holds
    keep_freed_memory()


def _run(argv: list[str]) -> int | None:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0)
    _configure()
    if argv[0] not in COMMANDS:
        print(USAGE)
        raise ValueError(f"unknown command {argv[0]!r}: choose one of {', '.join(COMMANDS)}")
    return COMMANDS[argv[0]](argv[1:])


def main(argv: list[str]) -> None:
    """Run a command; what goes wrong ends in one message and an exit status (:mod:`qtale_lightning.errors`)."""
    if status := errors.run(_run, argv, goes_on=bool(GOES_ON & {*argv[:1]})):
        raise SystemExit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
