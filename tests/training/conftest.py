"""Fixtures of whole runs."""

from pathlib import Path

import pytest
from tiny_runs import write_course


@pytest.fixture(scope="session")
def course(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Flags of a run on 80 rows."""
    return write_course(tmp_path_factory.mktemp("rows"), small_model)
