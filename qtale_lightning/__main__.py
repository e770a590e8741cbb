"""The command line: ``python -m qtale_lightning COMMAND …``; ``qtale_lightning.commands`` lists them."""

import logging
import sys
import warnings

from qtale_lightning import errors
from qtale_lightning.commands import COMMANDS
from qtale_lightning.commands.parser import parse


def _configure() -> None:
    """Logs, warnings and memory of a command's process."""
    from qtale_lightning.allocator import keep_freed_memory

    # Plain lines, which no width breaks: commands and paths in them are there to be copied.
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("qtale_lightning").setLevel(logging.INFO)
    # Lightning prints its lines by a handler of its own: behind the root's, each would come twice.
    logging.getLogger("lightning").propagate = False
    # "Seed set to …", which the run's configuration says.
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    # Not for the user: batches of a few kilobytes need no workers, a resumed run's folder isn't empty, and Lightning's
    # own use of torch is Lightning's concern.
    for message in (".*does not have many workers", ".*exists and is not empty", ".*treespec, LeafSpec"):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # it is given what argv holds
    # The module's is the one that is meant: no data module has one.
    warnings.filterwarnings("ignore", message=".*overridden `on_before_batch_transfer`")
    keep_freed_memory()


def _run(argv: list[str]) -> int | None:
    command, call = parse(argv or ["--help"], COMMANDS)
    _configure()
    try:
        return call()
    except KeyboardInterrupt as stopped:
        if command.goes_on:
            stopped.add_note("the same command goes on from here")
        raise


def main(argv: list[str]) -> None:
    """Run a command; what goes wrong ends in one message and an exit status (:mod:`qtale_lightning.errors`)."""
    if status := errors.run(_run, argv):
        raise SystemExit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
