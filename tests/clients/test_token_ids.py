"""Token ids: somebody has to say whose they are. LangChain sends OpenAI's by default."""

from __future__ import annotations

import base64
import hashlib
import random
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from server.api.token_ids import TokenIds
from server.errors import SettingsError
from server.settings import Settings
from tests.server.fakes import AppInProcess, in_process

HARMLESS = [1, 23956, 374, 2731, 25, 8102, 477, 356, 2]
"""`"Which is better: Java or C#` in cl100k_base: from BOS to EOS, as this model's ids are."""
PIECES = [b"how", b" are", b" you", b"?", b"\xc3", b"\xa9", b" \xf0\x9f\x99", b"\x82"]


def ask(server: AppInProcess, inputs: Any, **fields: Any) -> httpx.Response:
    return server.client.post("/v1/embeddings", json={"input": inputs, **fields})


def test_by_default_no_ids_are_taken(golden_checkpoint: Path) -> None:
    """10,000 texts of that shape, a request each hundred: one id is enough to be refused."""
    draw = random.Random(0)
    with in_process(golden_checkpoint, token_ids=Settings().token_ids, access_log=False) as server:
        for _ in range(100):
            many = [
                [1, *draw.choices(range(3, 32_000), k=draw.randint(4, 12)), 2] for _ in range(99)
            ]
            for inputs in ([HARMLESS, *many], HARMLESS):
                refused = ask(server, inputs)
                assert refused.status_code == 400
                message = refused.json()["error"]["message"]
                assert "check_embedding_ctx_length=False" in message
                assert "--token-ids" in message
        assert ask(server, HARMLESS, token_ids="model").status_code == 200
        assert ask(server, [1, 99_999, 2], token_ids="model").status_code == 400
        refused = ask(server, HARMLESS, token_ids="cl100k")
        assert refused.status_code == 400
        assert "no --token-ids cl100k" in refused.json()["error"]["message"]
        assert server.client.post("/tokenize", json={"input": HARMLESS}).status_code == 400


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    path = tmp_path / "ranks"
    lines = [b"%b %d" % (base64.b64encode(piece), rank) for rank, piece in enumerate(PIECES, 100)]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_ids_of_cl100k_are_their_text(golden_checkpoint: Path, ranks: Path) -> None:
    cases = {"how are you?": [100, 101, 102, 103], "howé": [100, 104, 105]}
    cases["how 🙂"] = [100, 106, 107]
    cases["how\ufffd"] = [100, 104]  # cut within a character
    with in_process(golden_checkpoint, token_ids="cl100k", tiktoken_ranks=ranks) as server:
        for fields in ({}, {"input_type": "query"}):
            found, expected = (
                np.array([row["embedding"] for row in ask(server, x, **fields).json()["data"]])
                for x in (list(cases.values()), list(cases))
            )
            np.testing.assert_array_equal(found, expected)
        unknown = ask(server, [[100], [100, 99]])
        assert unknown.status_code == 400
        assert unknown.json()["error"]["param"] == "input[1]"
        assert "99, which is no id of cl100k_base" in unknown.json()["error"]["message"]
        one = ask(server, [100, 101])
        assert one.status_code == 200
        assert ask(server, HARMLESS, token_ids="model").status_code == 200


def test_the_ranks_are_looked_for(
    ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(SettingsError, match=r"nothing is downloaded: .* install litellm or llama"):
        TokenIds("cl100k")
    name = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
    (tmp_path / name).write_bytes(ranks.read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(SettingsError, match="is not the file of cl100k_base's ranks"):
        TokenIds("cl100k")
    digest = hashlib.sha256(ranks.read_bytes()).hexdigest()
    monkeypatch.setattr("server.api.token_ids._SHA256", digest)
    assert TokenIds("cl100k").read([[100, 103]], None) == ["how?"]
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    folder = tmp_path / "litellm" / "litellm_core_utils" / "tokenizers"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(ranks.read_bytes())
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert TokenIds("cl100k").read([[100, 103]], None) == ["how?"]
    for content in (b"", b"no ranks", b"!!! 5"):
        ranks.write_bytes(content)
        with pytest.raises(SettingsError, match="has no lines of `base64 rank`"):
            TokenIds("cl100k", ranks)
    with pytest.raises(SettingsError, match="cannot be read: No such file"):
        TokenIds("cl100k", tmp_path / "absent")
