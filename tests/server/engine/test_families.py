"""A family of another mask and pooler is a row of the table, and no branch: served over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model.tasks import TASKS
from tests import toy_family
from tests.checkpoints import official_tokenizer
from tests.server.processes import ServerProcess, serving

pytestmark = pytest.mark.process

TEXTS = [
    "Freestyle wrestling allows throws.",
    "x",
    "The committee met twice, in May and in June, and agreed on nothing. " * 4,
]
NAME = "toy-embed"
TOLERANCE = 2e-5
LIMIT = 512
"""The sliding window, and so the reference needs none."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.families.FAMILIES", [toy_family.TOY])
        return toy_family.write(tmp_path_factory.mktemp("toy") / NAME)


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("log") / "log"
    options = ("--runner", "tests.toy_family:runner", "--max-input-tokens", str(LIMIT))
    with serving(checkpoint, *options, log=log, program="tests.toy_family") as running:
        yield running


class Reference:
    """transformers' MistralModel with its own causal mask, the last row, length 1."""

    def __init__(self, checkpoint: Path) -> None:
        from transformers import MistralConfig, MistralModel

        sizes = {k: v for k, v in toy_family.CONFIG.items() if k != "model_type"}
        self.model = MistralModel(MistralConfig(**sizes, attn_implementation="eager")).eval()
        self.model.load_state_dict(load_file(checkpoint / "model.safetensors"))
        self.tokenizer = official_tokenizer()
        self.tokenizer.encode_special_tokens = True

    def ids(self, text: str) -> list[int]:
        return [*self.tokenizer.encode(text).ids, 2]

    @torch.inference_mode()
    def vector(self, ids: list[int]) -> np.ndarray:
        states = self.model(torch.tensor([ids])).last_hidden_state[0]
        last = states[-1].double()
        return (last / last.norm()).numpy()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


def test_vectors_equal_the_reference(server: ServerProcess, reference: Reference) -> None:
    for texts in (TEXTS, TEXTS[:1]):  # of several lengths in a batch, and alone
        got = server.vectors(model=NAME, input=texts)
        expected = [reference.vector(reference.ids(text)) for text in texts]
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


def test_an_instruction_is_in_the_familys_words(
    server: ServerProcess, reference: Reference
) -> None:
    task = TASKS["NQ"].query
    expected = reference.vector(reference.ids(f"Task: {task}\nText: {TEXTS[0]}"))
    for fields in ({"task": "NQ"}, {"instruction": task}, {"input_type": "query"}):
        got = server.vectors(model=NAME, input=TEXTS[0], **fields)[0]
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE, err_msg=f"{fields}")


def test_a_truncated_input_keeps_its_eos(server: ServerProcess, reference: Reference) -> None:
    ids = reference.ids("many words " * LIMIT)
    expected = reference.vector([*ids[: LIMIT - 1], 2])
    long = "many words " * LIMIT
    got = server.vectors(model=NAME, input=long, truncate="END")[0]
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)
    refused = server.embed(model=NAME, input=long)
    assert (refused.status_code, refused.json()["error"]["code"]) == (
        400,
        "context_length_exceeded",
    )


def test_the_reference_is_causal_and_of_the_last_row(reference: Reference) -> None:
    """Were either another, the vectors would be other ones."""
    ids = reference.ids(TEXTS[0])
    with torch.inference_mode():
        full = torch.zeros(1, 1, len(ids), len(ids))
        states = reference.model(torch.tensor([ids]), attention_mask=full).last_hidden_state[0]
    seen = states[-1].double() / states[-1].double().norm()
    mean = states.double().mean(0) / states.double().mean(0).norm()
    for other in (seen, mean):
        assert np.abs(other.numpy() - reference.vector(ids)).max() > 100 * TOLERANCE


def test_a_family_that_nobody_added_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"model_type is 'toy-last', this server runs 'minis"):
        ServerProcess(checkpoint, log=tmp_path / "log")
