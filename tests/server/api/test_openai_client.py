"""The official client, unmodified: the authors' values from a real process, and what it makes of
all else from the app in this one."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest

from tests.checkpoints import golden_cases
from tests.server.fakes import AppInProcess, in_process
from tests.server.processes import ServerProcess

KEY = "sk-first-0123456789"
SECOND_KEY = "sk-second-9876543210"
MODEL = "golden-embed"


@pytest.fixture(scope="module")
def server(
    golden_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AppInProcess]:
    keys = tmp_path_factory.mktemp("openai") / "keys"
    keys.write_text(f"{SECOND_KEY}\n")
    with in_process(golden_checkpoint, api_key=[KEY], api_key_file=str(keys)) as server:
        yield server


def client_of(server: AppInProcess, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key=key, max_retries=0, http_client=server.new_client()
    )


@pytest.fixture
def client(server: AppInProcess) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


@pytest.fixture
def real_client(golden_server: ServerProcess) -> Iterator[openai.OpenAI]:
    url = f"{golden_server.url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def passages() -> dict[str, list]:
    return next(case for case in golden_cases() if case["name"] == "passages")


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_one_string(real_client: openai.OpenAI, encoding: str | None) -> None:
    """None: the SDK asks for base64 and decodes it itself."""
    case = passages()
    options = {"encoding_format": encoding} if encoding else {}
    answer = real_client.embeddings.create(model=MODEL, input=case["texts"][0], **options)
    vector = answer.data[0].embedding
    if isinstance(vector, str):
        vector = np.frombuffer(base64.b64decode(vector), "<f4")
    np.testing.assert_allclose(vector, case["embeddings"][0], rtol=0, atol=2e-5)
    assert answer.object == "list"
    assert answer.model == MODEL
    assert answer.usage.prompt_tokens == len(case["token_ids"][0])


def test_2048_strings(real_client: openai.OpenAI) -> None:
    texts = [f"text number {index}" for index in range(2048)]
    answer = real_client.embeddings.create(model=MODEL, input=texts)
    assert [item.index for item in answer.data] == list(range(2048))
    alone = real_client.embeddings.create(model=MODEL, input=texts[1234]).data[0].embedding
    np.testing.assert_allclose(answer.data[1234].embedding, alone, rtol=0, atol=1e-5)
    assert len({tuple(item.embedding) for item in answer.data}) == 2048


def test_token_ids(real_client: openai.OpenAI) -> None:
    case = passages()
    one = real_client.embeddings.create(model=MODEL, input=case["token_ids"][0])
    both = real_client.embeddings.create(model=MODEL, input=case["token_ids"])
    np.testing.assert_allclose(one.data[0].embedding, case["embeddings"][0], rtol=0, atol=2e-5)
    np.testing.assert_allclose(both.data[1].embedding, case["embeddings"][1], rtol=0, atol=2e-5)


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == [MODEL, f"{MODEL}-query", f"{MODEL}-passage"]
    model = client.models.retrieve(f"{MODEL}-query")
    assert (model.id, model.object, model.owned_by) == (
        f"{MODEL}-query",
        "model",
        "nv-embed-server",
    )


def test_a_second_key_from_the_file(server: AppInProcess) -> None:
    with client_of(server, SECOND_KEY) as client:
        assert client.embeddings.create(model=MODEL, input="x").data


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="text-embedding-3-small", input="x")
    error = caught.value
    assert (error.type, error.param, error.code) == (
        "invalid_request_error",
        "model",
        "model_not_found",
    )
    assert "The model 'text-embedding-3-small' does not exist" in error.message
    assert MODEL in error.message


def test_a_too_long_input(client: openai.OpenAI) -> None:
    texts = ["short", "word " * 40_000]
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=MODEL, input=texts)
    error = caught.value
    assert (error.type, error.param, error.code) == (
        "invalid_request_error",
        "input[1]",
        "context_length_exceeded",
    )
    assert "maximum context length is 32768 tokens, however you requested 40" in error.message


@pytest.mark.parametrize(("value", "param"), [("", "input"), (["a", ""], "input[1]")])
def test_an_empty_string(client: openai.OpenAI, value: object, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=MODEL, input=value)
    error = caught.value
    assert (error.type, error.param, error.code) == ("invalid_request_error", param, None)
    assert "empty string" in error.message


def test_a_bad_key(server: AppInProcess) -> None:
    with (
        client_of(server, "sk-wrong") as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.embeddings.create(model=MODEL, input="x")
    error = caught.value
    assert (error.type, error.param, error.code) == (
        "invalid_request_error",
        None,
        "invalid_api_key",
    )
    assert "Incorrect API key" in error.message
    assert "sk-wrong" not in error.message


def test_ids_of_another_tokenizer(client: openai.OpenAI) -> None:
    """What LangChain's OpenAIEmbeddings sends by default: cl100k ids, without BOS and EOS."""
    for ids in ([[9906, 1917]], [[1, 100_000, 2]], [[-1, 5]]):
        with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
            client.embeddings.create(model=MODEL, input=ids)


def test_dimensions(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model=MODEL, input="x", dimensions=64)
    assert len(answer.data[0].embedding) == 64
    for dimensions in (32, 65):
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model=MODEL, input="x", dimensions=dimensions)
        assert caught.value.param == "dimensions"


def test_keys_and_texts_stay_out_of_the_log(server: AppInProcess, client: openai.OpenAI) -> None:
    client.embeddings.create(model=MODEL, input="a very secret sentence")
    assert "POST /v1/embeddings 200" in server.log
    for secret in (KEY, SECOND_KEY, "very secret"):
        assert secret not in server.log
