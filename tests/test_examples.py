"""Every example runs as its page says, against one server with the default model."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.server.processes import ROOT, ServerProcess

EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.process
PROGRAMS = sorted(p.name for p in EXAMPLES.iterdir() if p.suffix in (".py", ".sh"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    server = ServerProcess(None, log=tmp_path_factory.mktemp("server") / "log").wait_ready()
    yield server
    assert server.stop() == 0


def run(*command: str, server: ServerProcess | None = None) -> list[str]:
    """The lines that it prints. Nobody else's address or key reaches it."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OPENAI_", "LANGCHAIN_", "LANGSMITH_", "NV_EMBED_"))
    }
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    if server is not None:
        environment["OPENAI_BASE_URL"] = f"{server.url}/v1"
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def needs(package: str) -> None:
    """The gate installs the locked test packages, so that nothing is skipped there."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; requirements-test.lock has it")


def test_the_openai_client_finds_the_passage(server: ServerProcess) -> None:
    lines = run(sys.executable, "examples/openai_client.py", server=server)
    assert lines == ["The canteen opens at noon."]


def test_langchain_embeds_each_side_as_it_should(server: ServerProcess, tmp_path: Path) -> None:
    needs("langchain_openai")
    program = "examples/langchain_retrieval.py"
    assert run(sys.executable, program, server=server) == ["The canteen opens at noon."]
    # The right passage may be found on the wrong side, too: so compare the vectors themselves.
    probe = tmp_path / "probe.py"
    probe.write_text(
        (ROOT / program).read_text()
        + "import json\nprint(json.dumps([store.embeddings.embed_query('noon'), "
        "*store.embeddings.embed_documents(['noon'])]))\n"
    )
    query, passage = json.loads(run(sys.executable, str(probe), server=server)[-1])
    for given, side in ((query, "query"), (passage, "passage")):
        expected = server.vectors(model="nv-embed-small", input="noon", input_type=side)[0]
        np.testing.assert_allclose(given, expected, atol=2e-5)
    assert np.abs(np.subtract(query, passage)).max() > 1e-3


@pytest.mark.parametrize(
    ("question", "file"),
    [("when can I eat?", "canteen.txt"), ("may I bring my dog?", "campus.txt")],
)
def test_semantic_search_names_the_right_file(
    server: ServerProcess, question: str, file: str
) -> None:
    lines = run(
        sys.executable, "examples/semantic_search.py", "examples/texts", question, server=server
    )
    assert len(lines) == 3
    assert re.match(rf"0\.\d+  {file}: ", lines[0]), lines


def test_bulk_encode_writes_a_row_for_each_line(tmp_path: Path) -> None:
    assert run("examples/bulk_encode.sh", str(tmp_path)) == ["3 rows in texts.npy", "(3, 256)"]
    rows = np.load(tmp_path / "texts.npy")
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_a_batch_file_is_answered_line_by_line(tmp_path: Path) -> None:
    lines = run("examples/batch_file.sh", str(tmp_path))
    assert lines == ["2 rows in answers.jsonl", "q1 200 1", "p1 200 2"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_examples_are_short_listed_and_run_here(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) < 60
    assert f"]({name})" in (EXAMPLES / "README.md").read_text()
    assert f"examples/{name}" in Path(__file__).read_text()
