"""Vectors from a running server that speaks OpenAI's embeddings API.

Owns what goes wrong on the way: each refusal becomes one sentence, an overloaded server is waited
for. Knows nothing of what the vectors are for.
"""

from __future__ import annotations

import base64
import http.client
import json
import logging
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
from model.families import Side
from model.tasks import prefix_of
from model.training.embedders import TakenTasks

logger = logging.getLogger("nv_embed.embedders")

BATCH_TEXTS, BATCH_CHARS = 256, 200_000
"""Of one request; OpenAI's contract allows 2,048 inputs and 300,000 tokens."""
ATTEMPTS = 8
_BUSY = (429, 502, 503, 504)
_NO_ROUTE = (400, 403, 404, 405, 410, 501)
"""What servers, and gateways before them, answer for a path that they do not have."""
_NO_JSON = (json.JSONDecodeError, UnicodeDecodeError, RecursionError)
_MOST_WAIT_S = 60.0
_TIMEOUT_S = 600


class RemoteError(ModelError):
    """A server refused, or could not be reached; says which one and why."""


class RefusedError(RemoteError):
    """A server answered with `status`, an error."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


class NoJSONError(RemoteError):
    """What a server answered is no JSON."""


class ServerEmbedder:
    """An Embedder (`embedders`) around a server's model.

    A server of this project is known by its `/v1/instructions`: it is sent the side and the task,
    and writes the template of its model's family itself. Any other is sent NV-Embed's prefix as
    `prompt`; most ignore that, and embed the texts bare. Both are sent `truncate`.
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
        self._taken = self._taken_tasks()

    def __call__(self, texts: Sequence[str], side: Side, task: str = "", /) -> NDArray[np.float32]:
        """Raises RemoteError; after a 429 or 503 it waits as `retry-after` says, and asks again."""
        if self._taken is None:
            around = {"prompt": prefix_of(task)}
        else:
            around = {"input_type": side, "instruction": self._taken(task)}
        parts: list[NDArray[np.float32]] = []
        with tqdm(total=len(texts), desc="Embedding", unit=" texts", disable=None) as bar:
            for batch in request_batches(texts):
                parts.append(self._embed(batch, around))
                bar.update(len(batch))
        rows = np.concatenate(parts) if parts else np.empty((0, 0), dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)  # type: ignore[no-any-return]

    def _embed(self, texts: list[str], around: dict[str, str]) -> NDArray[np.float32]:
        body = {
            "model": self.model,
            "input": texts,
            **around,
            "truncate": "END",
            "encoding_format": "base64",
        }
        try:
            answer = self._call("/v1/embeddings", body)
        except RefusedError as error:
            if error.status != 413 or len(texts) == 1:
                raise
            half = len(texts) // 2
            return np.concatenate(
                [self._embed(texts[:half], around), self._embed(texts[half:], around)]
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

    def _taken_tasks(self) -> TakenTasks | None:
        """How the model takes a task; None of a server that is not of this project."""
        try:
            said = self._call("/v1/instructions", None)
            return TakenTasks(str(said["family"]), said["template"])
        except RefusedError as error:
            if error.status not in _NO_ROUTE:
                raise
        except (NoJSONError, KeyError, TypeError):
            pass
        logger.warning(
            "%s has no /v1/instructions: instructions are sent as `prompt` with NV-Embed's prefix, "
            "which the server may ignore",
            self.url,
        )
        return None

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
                    raise RefusedError(error.code, self._refusal(error)) from None
                self._sleep(_wait_s(error.headers, attempt))
            except (OSError, ValueError, http.client.HTTPException, RecursionError) as error:
                # No address, nobody there, a reset, an answer that is cut or without JSON.
                reason = getattr(error, "reason", error)
                said = str(reason) or repr(reason)
                kind = NoJSONError if isinstance(error, _NO_JSON) else RemoteError
                raise kind(f"{self.url} does not answer as a server: {said}") from None
        raise AssertionError(ATTEMPTS)

    def _refusal(self, error: urllib.error.HTTPError) -> str:
        said = _message(error)
        if error.code == 401:
            return f"{self.url} wants a valid key: --api-key, or NV_EMBED_API_KEY ({said})"
        if error.code == 413:
            return f"{self.url}: a single text is too large for it ({said})"
        if error.code == 429:
            return f"{self.url} is still overloaded after {ATTEMPTS} tries ({said})"
        return f"{self.url} answered {error.code}: {said}"


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
