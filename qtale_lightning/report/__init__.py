"""A run's results presented: the tables, plots and page made from `results.json`."""

from pathlib import Path
from typing import TYPE_CHECKING

from qtale_lightning.lazy import lazily
from qtale_lightning.results import Results, load_results

if TYPE_CHECKING:
    from rich.console import Console

    from qtale_lightning.report.figures import write_figures
    from qtale_lightning.report.tables import print_summary, write_markdown

__all__ = ["print_summary", "write_figures", "write_markdown", "write_report"]

# Reading results doesn't wait for pandas and matplotlib.
__getattr__ = lazily(
    __name__,
    {
        f"{__name__}.figures": ["write_figures"],
        f"{__name__}.tables": ["print_summary", "write_markdown"],
    },
)


def write_report(run_dir: str | Path, console: "Console | None" = None) -> Results:
    """Makes a run's plots and `results.md` from its `results.json`, prints the summary, ending in the page's path;
    returns the results.

    Raises:
        FileNotFoundError, ValueError: as `load_results`.
    """
    from rich.console import Console

    from qtale_lightning.report.figures import write_figures
    from qtale_lightning.report.tables import print_summary, write_markdown

    write_figures(run_dir)
    page = write_markdown(run_dir)
    results, console = load_results(run_dir), console or Console()
    print_summary(results, console)
    console.print(f"all of it, with figures: {page}", markup=False, highlight=False, soft_wrap=True)
    return results
