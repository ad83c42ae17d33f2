from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.processes import ServerProcess, serving


@pytest.fixture(scope="session")
def golden_server(
    golden_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """The golden checkpoint, served at float32 with the default options."""
    log = tmp_path_factory.mktemp("golden_server") / "log"
    with serving(golden_checkpoint, log=log) as server:
        yield server
