"""The examples run as their page says, against one server with the default model.

Those whose packages the lock holds; `make test-examples` runs them all, each in an environment of
its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.examples.cases import CASES, EXAMPLES, PAGE, PROGRAMS, Case
from tests.server.processes import ROOT, ServerProcess

pytestmark = pytest.mark.process
ELSEWHERE = {"llama_index_retrieval.py", "pgvector_store.py", "lancedb_store.py"}
"""Programs whose packages requirements-test.lock does not hold."""


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


def run_case(name: str, case: Case, server: ServerProcess, folder: Path) -> None:
    shutil.copytree(EXAMPLES / "texts", folder / "texts")
    arguments = [argument.replace("FOLDER", str(folder)) for argument in case.arguments]
    python = [] if name.endswith(".sh") else [sys.executable]
    lines = run(
        *python, f"examples/{name}", *arguments, server=server if case.needs_server else None
    )
    case.check(lines, folder)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ELSEWHERE])
def test_an_example_prints_what_it_must(name: str, server: ServerProcess, tmp_path: Path) -> None:
    run_case(name, CASES[name], server, tmp_path)


def test_langchain_embeds_each_side_as_it_should(server: ServerProcess, tmp_path: Path) -> None:
    # The right passage may be found on the wrong side, too: so compare the vectors themselves.
    probe = tmp_path / "probe.py"
    probe.write_text(
        (EXAMPLES / "langchain_retrieval.py").read_text()
        + "import json\nprint(json.dumps([store.embeddings.embed_query('noon'), "
        "*store.embeddings.embed_documents(['noon'])]))\n"
    )
    query, passage = json.loads(run(sys.executable, str(probe), server=server)[-1])
    for given, side in ((query, "query"), (passage, "passage")):
        expected = server.vectors(model="nv-embed-small", input="noon", input_type=side)[0]
        np.testing.assert_allclose(given, expected, atol=2e-5)
    assert np.abs(np.subtract(query, passage)).max() > 1e-3


def test_semantic_search_embeds_only_what_is_new(server: ServerProcess, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    shutil.copytree(EXAMPLES / "texts", folder)
    before = server.metric("nv_embed_inputs_total")

    def ask(question: str) -> str:
        return run(
            sys.executable, "examples/semantic_search.py", str(folder), question, server=server
        )[0]

    assert "canteen.txt: " in ask("when can I eat?")
    assert server.metric("nv_embed_inputs_total") == before + 1 + 6
    (folder / "more.txt").write_text("Umbrellas that were found are kept for a year.")
    assert "more.txt: " in ask("where is my lost umbrella?")
    assert server.metric("nv_embed_inputs_total") == before + 7 + 1 + 1
    (folder / "more.txt").unlink()
    assert "campus.txt: " in ask("may I bring my dog?")
    assert server.metric("nv_embed_inputs_total") == before + 9 + 1
    index = dict(np.load(folder / ".vectors.npz"))
    np.savez(folder / ".vectors.npz", **{**index, "fingerprint": "of another model"})
    ask("may I bring my dog?")
    assert server.metric("nv_embed_inputs_total") == before + 10 + 1 + 6, "all anew"


@pytest.mark.parametrize("name", PROGRAMS)
def test_examples_are_short_listed_and_have_a_case(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) < 60
    assert f"]({name})" in PAGE
    assert name in CASES


def test_each_case_is_of_an_example() -> None:
    assert sorted(CASES) == PROGRAMS
