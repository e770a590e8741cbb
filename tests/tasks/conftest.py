"""Rows in every task's fields."""

from typing import Any

import pytest

from tests.tasks.rows import ROWS


@pytest.fixture
def rows() -> dict[str, dict[str, Any]]:
    """One well-formed row of each task, by task name; copies, so that a test may break them."""
    return {task: dict(row) for task, row in ROWS.items()}
