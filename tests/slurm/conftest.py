"""Fixtures of jobs on a real Slurm."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, obstacle, open_cluster
from tiny_runs import write_course


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes with a GPU each that no program can use; tests that need them skip where Slurm cannot run."""
    reason = obstacle()
    if reason:
        pytest.skip(f"Slurm cannot run: {reason}")
    with open_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def course(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Flags of a tiny run."""
    return write_course(tmp_path_factory.mktemp("rows"), small_model)
