"""The runs that the report is tested with."""

from tests.report.conftest import full, qtale, row

__all__ = ["full", "qtale", "row"]
