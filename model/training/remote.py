"""Vectors from a running server that speaks OpenAI's embeddings API.

Owns how many texts go in a request, and what a server is asked by. Knows nothing of what the
vectors are for.
"""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from model.families import Side
from model.progress import Progress
from model.tasks import prefix_of
from model.training.embedders import TakenTasks
from model.training.endpoint import Endpoint, NoJSONError, RemoteError, TooLargeError

logger = logging.getLogger("nv_embed.embedders")

BATCH_TEXTS, BATCH_CHARS = 256, 200_000
"""Of one request; OpenAI's contract allows 2,048 inputs and 300,000 tokens."""
_NO_ROUTE = (400, 403, 404, 405, 410, 501)
"""What servers, and gateways before them, answer for a path that they do not have."""


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
        self._endpoint = Endpoint(url, api_key, sleep=sleep)
        self.url = self._endpoint.url
        self.model = model or self._first_model()
        self._taken = self._taken_tasks()

    def __call__(self, texts: Sequence[str], side: Side, task: str = "", /) -> NDArray[np.float32]:
        """Raises RemoteError; after a 429 or 503 it waits as `retry-after` says, and asks again."""
        if self._taken is None:
            around = {"prompt": prefix_of(task)}
        else:
            around = {"input_type": side, "instruction": self._taken(task)}
        parts: list[NDArray[np.float32]] = []
        with Progress(len(texts), unit="texts") as bar:
            for batch in request_batches(texts):
                parts.append(self._embed(batch, around))
                bar.advance(len(batch))
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
            answer = self._endpoint.call("/v1/embeddings", body)
        except TooLargeError:
            if len(texts) == 1:
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
        names = self._endpoint.models()
        if not names:
            raise RemoteError(f"{self.url}/v1/models names no model")
        return names[0]

    def _taken_tasks(self) -> TakenTasks | None:
        """How the model takes a task; None of a server that is not of this project."""
        try:
            said = self._endpoint.call("/v1/instructions")
            return TakenTasks(str(said["family"]), said["template"])
        except (NoJSONError, KeyError, TypeError):
            pass
        except RemoteError as error:
            if error.status not in _NO_ROUTE:
                raise
        logger.warning(
            "%s has no /v1/instructions: instructions are sent as `prompt` with NV-Embed's prefix, "
            "which the server may ignore",
            self.url,
        )
        return None


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
