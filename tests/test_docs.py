"""The pages say what the code says: codes, messages, metrics, options, links, decisions."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from model.hub import locate
from server import errors
from server.engine.engine import EmbeddingEngine
from server.engine.metrics import Metrics
from server.http.app import create_app
from server.settings import HIDDEN, Settings
from tests.layers import MODEL, ROOT, SERVER

DOCS = ROOT / "docs"
TROUBLE = (DOCS / "troubleshooting.md").read_text()
OPERATIONS = (DOCS / "operations.md").read_text()
PAGES = [*ROOT.glob("*.md"), *DOCS.glob("*.md"), *(ROOT / "examples").glob("*.md")]


def classes(base: type[errors.ServerError]) -> list[type[errors.ServerError]]:
    return [base, *(found for sub in base.__subclasses__() for found in classes(sub))]


def test_each_code_of_an_error_has_an_entry_with_its_status() -> None:
    codes: dict[str, int] = {}
    for kind in classes(errors.ServerError):
        if kind.code is not None:
            codes.setdefault(kind.code, kind.status)
    entries = dict(re.findall(r"^### (\w+)\n(\d{3})\. ", TROUBLE, re.MULTILINE))
    assert {code: int(status) for code, status in entries.items()} == codes


def strings() -> str:
    """All string literals of the code, one a line, values in f-strings left out."""
    found = []
    for package in ("server", "model"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


def test_messages_of_a_failed_start_are_those_of_the_code() -> None:
    table = TROUBLE.split("## The server does not start")[1].split("\n## ")[0]
    quoted = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(quoted) > 15
    said = strings() + (ROOT / "Makefile").read_text()
    assert not [message for message in quoted if message not in said]


def test_the_table_of_metrics_is_complete(golden_checkpoint: Path) -> None:
    text = OPERATIONS.split("## Metrics")[1].split("\n## ")[0]
    settings = Settings(devices=["cpu"], api_key=["name:some-key"])
    engine = EmbeddingEngine(settings, locate(str(golden_checkpoint)))
    create_app(settings, engine, engine.metrics)
    names = set()
    for line in engine.metrics.registry.restricted_registry(_all_names(engine.metrics)).collect():
        if line.name.startswith(("nv_embed", "vllm")):
            names.add(line.name + ("_total" if line.type == "counter" else ""))
    # Of the listening server (server/http/lifecycle.py), and one that needs a running loop.
    names |= {"nv_embed_open_connections", "nv_embed_max_connections", "nv_embed_event_loop_tasks"}
    assert set(re.findall(r"`((?:nv_embed|vllm)[\w:]+)`", text)) == names


def _all_names(metrics: Metrics) -> list[str]:
    names = metrics.registry._names_to_collectors
    return [name for name in names if name != "nv_embed_event_loop_tasks"]


def test_every_option_stands_in_both_tables() -> None:
    flags = {f"--{name.replace('_', '-')}" for name in Settings.model_fields if name not in HIDDEN}
    readme = (ROOT / "README.md").read_text().split("## Options")[1].split("\n## ")[0]
    assert flags - set(re.findall(r"`(--[a-z-]+)`", readme)) == set()
    listed = OPERATIONS.split("## Options")[1].split("\n## ")[0]
    assert (
        flags - {flag.replace("--no-", "--") for flag in re.findall(r"--[a-z-]+", listed)} == set()
    )


def test_the_architecture_names_every_room_and_every_module() -> None:
    text = (DOCS / "architecture.md").read_text()
    assert not [wing for wing in SERVER if wing and f"| `{wing}/` |" not in text]
    server, model = text.split("### server/")[1].split("\n## ")[0].split("### model/")
    modules = {name for names in SERVER.values() for name in names} - {"__main__"}
    assert not modules - set(re.findall(r"`(\w+)`", server))
    assert not {name.rpartition(".")[2] for name in MODEL} - set(re.findall(r"`(\w+)`", model))


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_each_word_about_another_server_has_its_source() -> None:
    """In the tables of docs/comparison.md; what is not known says so."""
    text, sources = (DOCS / "comparison.md").read_text().split("\n## Sources\n")
    listed = re.findall(r"^\| ([A-Z]\d) \| https://\S+", sources, re.MULTILINE)
    cited = re.findall(r"\[([A-Z]\d)\](?!\()", text)
    assert sorted(listed) == sorted(set(cited)), "each is named once, and used"
    tables = text.split("## What each can do\n")[1].split("\n## ")[0].strip().split("\n\n")
    assert len(tables) == 2
    names: list[str] = []
    for table in tables:
        heads, _, *rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
        names += heads
        others = [column for column, head in enumerate(heads, start=1) if head != "this"]
        assert len(rows) == 16
        for row in rows:
            for cell in (row[column] for column in others):
                unknown = r"not (known|read)(; not (known|read))?"
                assert re.search(r"\[[A-Z]\d\]", cell) or re.fullmatch(unknown, cell), row
    assert {"this", "TEI", "vLLM", "Infinity", "llama.cpp server"} <= set(names)


def test_decisions_are_numbered_and_say_what_follows() -> None:
    text = (ROOT / "DECISIONS.md").read_text()
    numbers = [int(number) for number in re.findall(r"^### D(\d+)$", text, re.MULTILINE)]
    assert numbers == list(range(len(numbers), 0, -1)), "newest first, without a gap"
    status = r"(in force|a finding|open|replaced[^.]*|replaced: .+?)\. Consequence: .+\."
    for entry in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        heading, said, blank, first, *_ = entry.splitlines()
        assert re.fullmatch(f"Status: {status}", said), heading
        assert not blank
        assert first.startswith("**"), heading
    assert len(re.findall(r"^\*\*", text, re.MULTILINE)) == len(numbers), "an entry has no number"
    for cited in re.findall(r"\bD(\d+)\b", text):
        assert int(cited) in numbers


def test_the_workflow_runs_the_gate_and_hooks_run_ruff() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    runs = {
        name: [step["run"] for step in job["steps"] if "run" in step]
        for name, job in workflow["jobs"].items()
    }
    assert runs["gate"] == [".ci/run"]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for others in (steps for name, steps in runs.items() if name != "gate"):
        for made in others:
            assert made.startswith("make ")
            assert set(made.split()[1:]) <= targets
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    entries = [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]]
    gate = (ROOT / "Makefile").read_text()
    for entry in entries:
        command = entry.removeprefix(".venv/bin/").removesuffix(" --force-exclude")
        assert f"$(BIN)/{command} ." in gate
    for form in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(form.read_text()), form
