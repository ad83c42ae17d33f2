"""Fixtures that the tests of both packages share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint


@pytest.fixture(scope="session")
def golden_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that golden.json's values belong to. Read-only: tests that change it copy."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "golden")


@pytest.fixture(scope="session")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same recipe at a width where low precision behaves more as at the official one."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "wide", "wide")
