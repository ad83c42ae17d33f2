"""What openapi.yaml says against what a live server does: schemathesis makes requests from it,
right and wrong ones, and compares each answer's status, headers and body with the document."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import settings
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.config import SchemathesisConfig

from tests.server.processes import ROOT, ServerProcess, serving

pytestmark = pytest.mark.process

load_all_checks()
# What a schema cannot say is a 400, too: the model's width, a task's name, BOS and EOS of ids.
positive_data_acceptance, negative_data_rejection = CHECKS.get_by_names(
    ["positive_data_acceptance", "negative_data_rejection"]
)
CONFIG = SchemathesisConfig.from_dict({"seed": 71})
DOCUMENT = schemathesis.openapi.from_path(ROOT / "openapi.yaml", config=CONFIG)


@pytest.fixture(scope="module")
def server(
    golden_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("schemathesis") / "log"
    options = ("--runner", "tests.server.runners:Hashing", "--no-access-log")
    with serving(golden_checkpoint, *options, log=log) as server:
        yield server
        answered = server.client.get("/metrics").text
        assert re.search(r'requests_total\{route="embeddings",status="200"\} [1-9]', answered)


UNSAID = ("task", "input_type", "dimensions", "examples", "truncation_side", "token_ids")
BOUNDED = settings(max_examples=20, derandomize=True, deadline=None)


@DOCUMENT.parametrize()
@BOUNDED
def test_answers_are_as_documented(case: schemathesis.Case, server: ServerProcess) -> None:
    case.call_and_validate(base_url=server.url, excluded_checks=[positive_data_acceptance])


@DOCUMENT.include(method="POST").parametrize()
@BOUNDED
def test_answers_of_the_served_model_are(case: schemathesis.Case, server: ServerProcess) -> None:
    """A model's name made up by chance is a 404, whatever else a request holds; and names of tasks,
    sides and widths are a 400."""
    if isinstance(case.body, dict):
        case.body["model"] = "golden-embed"
        for name in UNSAID:
            case.body.pop(name, None)
    case.call_and_validate(
        base_url=server.url, excluded_checks=[positive_data_acceptance, negative_data_rejection]
    )
