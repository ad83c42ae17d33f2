"""Vectors from a running server that speaks OpenAI's embeddings API.

Owns what goes wrong on the way: each refusal becomes one sentence, an overloaded server is waited
for. Knows nothing of what the vectors are for.
"""

from __future__ import annotations

import base64
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from email.message import Message
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from model.errors import ModelError, UnsupportedError

BATCH_TEXTS, BATCH_CHARS = 256, 200_000
"""Of one request; OpenAI's contract allows 2,048 inputs and 300,000 tokens."""
ATTEMPTS = 8
_BUSY = (429, 502, 503, 504)
_MOST_WAIT_S = 60.0
_TIMEOUT_S = 600


class RemoteError(ModelError):
    """A server refused, or could not be reached; says which one and why."""


class TooLargeError(RemoteError):
    """413: the request's body is larger than the server takes."""


class ServerEmbedder:
    """texts and a verbatim instruction -> float32 [N, D], of length 1.

    The instruction is sent as `prompt`, the length as `truncate`: fields of this project's server.
    Another server ignores them, and embeds the texts bare.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        api_key: str | None = None,
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """url: with or without /v1; model: by default the first that the server names.

        Raises UnsupportedError for an address that is none, RemoteError.
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise UnsupportedError(f"{url} is not an http address")
        self._api_key, self._sleep = api_key, sleep
        self.model = model or self._first_model()

    def __call__(self, texts: Sequence[str], instruction: str = "") -> NDArray[np.float32]:
        """Raises RemoteError; after a 429 or 503 it waits as `retry-after` says, and asks again."""
        parts: list[NDArray[np.float32]] = []
        with tqdm(total=len(texts), desc="Embedding", unit=" texts", disable=None) as bar:
            for batch in request_batches(texts):
                parts.append(self._embed(batch, instruction))
                bar.update(len(batch))
        rows = np.concatenate(parts) if parts else np.empty((0, 0), dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)  # type: ignore[no-any-return]

    def _embed(self, texts: list[str], instruction: str) -> NDArray[np.float32]:
        body = {
            "model": self.model,
            "input": texts,
            "prompt": instruction,
            "truncate": "END",
            "encoding_format": "base64",
        }
        try:
            answer = self._call("/v1/embeddings", body)
        except TooLargeError:
            if len(texts) == 1:
                raise
            half = len(texts) // 2
            return np.concatenate(
                [self._embed(texts[:half], instruction), self._embed(texts[half:], instruction)]
            )
        try:
            found = {item["index"]: _vector(item["embedding"]) for item in answer["data"]}
            return np.stack([found[index] for index in range(len(texts))])
        except (KeyError, TypeError, ValueError) as error:
            raise RemoteError(
                f"{self.url} did not answer with one vector for each text: {error!r}"
            ) from None

    def _first_model(self) -> str:
        try:
            return str(self._call("/v1/models", None)["data"][0]["id"])
        except (KeyError, TypeError, IndexError):
            raise RemoteError(f"{self.url}/v1/models names no model") from None

    def _call(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                # http and https alone, see __init__
                request = urllib.request.Request(self.url + path, data, headers)  # noqa: S310
                with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:  # noqa: S310
                    return json.loads(response.read())  # type: ignore[no-any-return]
            except urllib.error.HTTPError as error:
                final = attempt == ATTEMPTS or error.headers.get("x-should-retry") == "false"
                if error.code not in _BUSY or final:
                    raise self._refusal(error) from None
                self._sleep(_wait_s(error.headers, attempt))
            except (OSError, ValueError, http.client.HTTPException, RecursionError) as error:
                # No address, nobody there, a reset, an answer that is cut or without JSON.
                reason = getattr(error, "reason", error)
                said = str(reason) or repr(reason)
                raise RemoteError(f"{self.url} does not answer as a server: {said}") from None
        raise AssertionError(ATTEMPTS)

    def _refusal(self, error: urllib.error.HTTPError) -> RemoteError:
        said = _message(error)
        if error.code == 401:
            return RemoteError(
                f"{self.url} wants a valid key: --api-key, or NV_EMBED_API_KEY ({said})"
            )
        if error.code == 413:
            return TooLargeError(f"{self.url}: a single text is too large for it ({said})")
        if error.code == 429:
            return RemoteError(f"{self.url} is still overloaded after {ATTEMPTS} tries ({said})")
        return RemoteError(f"{self.url} answered {error.code}: {said}")


def request_batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """`texts` in order, cut by number and by characters; a longer text goes alone."""
    batch: list[str] = []
    chars = 0
    for text in texts:
        if batch and (len(batch) == BATCH_TEXTS or chars + len(text) > BATCH_CHARS):
            yield batch
            batch, chars = [], 0
        batch.append(text)
        chars += len(text)
    if batch:
        yield batch


def _vector(embedding: str | list[float]) -> NDArray[np.float32]:
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding), dtype="<f4")
    return np.array(embedding, dtype=np.float32)


def _message(error: urllib.error.HTTPError) -> str:
    """What an error's body says, in OpenAI's envelope or not; one short line."""
    body = error.read().decode("utf-8", errors="replace")
    try:
        said = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        said = body
    return " ".join(said.split())[:300] or str(error.reason)


def _wait_s(headers: Message, attempt: int) -> float:
    """Seconds that the server asks for, at most 60; without its word 1, 2, 4, …"""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return min(max(float(headers[name]) * unit, 0.0), _MOST_WAIT_S)
        except (TypeError, ValueError):  # absent, or a date
            continue
    return float(min(2 ** (attempt - 1), _MOST_WAIT_S))
