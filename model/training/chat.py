"""A chat model behind any server that speaks OpenAI's chat completions.

Knows nothing of what it is asked for, nor whether an answer is any good.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from model.errors import ModelError, did_you_mean
from model.training.endpoint import Endpoint, RemoteError

KEY_OPTION = "--chat-api-key, or NV_EMBED_CHAT_API_KEY"
_FILTERED = "content_filter"
"""What OpenAI and Azure call an answer, or a prompt, that they refuse for its contents."""


class StoppedError(ModelError):
    """Nothing more is to be asked."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said; `finish` tells why it ended: stop, length, refusal, …"""

    text: str
    finish: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class ChatModel:
    """prompt -> Answer. May be asked by several threads at a time."""

    def __init__(
        self,
        url: str,
        model: str | None = None,
        api_key: str | None = None,
        *,
        temperature: float = 1.0,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        """model: by default the first that the server names. Asks the server for its models, so
        that a wrong address, key or name is told at once.

        Raises UnsupportedError for an address that is none, RemoteError.
        """
        self._stopped = threading.Event()
        self._sleep = sleep or time.sleep
        self._endpoint = Endpoint(url, api_key, key_option=KEY_OPTION, sleep=self._wait)
        self.url, self._temperature = self._endpoint.url, temperature
        self._names = self._known_names()
        if model is None and not self._names:
            raise RemoteError(f"{self.url} names no model: --chat-model says which to ask")
        self.name = model or self._names[0]

    def stop(self) -> None:
        """From now on calls that wait end, and others do not begin: StoppedError."""
        self._stopped.set()

    def __call__(self, prompt: str) -> Answer:
        """Raises RemoteError; an overloaded server, and one that is away, is waited for."""
        if self._stopped.is_set():
            raise StoppedError
        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self._temperature,
        }
        try:
            raw = self._endpoint.call("/v1/chat/completions", body, patient=True)
        except RemoteError as error:
            if error.status == 400 and error.code == _FILTERED:
                return Answer("", "refusal")
            raise self._explained(error) from None
        try:
            choice = raw["choices"][0]
            text, finish = choice["message"].get("content"), choice.get("finish_reason")
            refused = choice["message"].get("refusal") or finish == _FILTERED
        except (KeyError, TypeError, IndexError, AttributeError):
            raise RemoteError(f"{self.url} did not answer with a chat completion") from None
        usage = raw.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        return Answer(
            text if isinstance(text, str) else "",
            "refusal" if refused else str(finish),
            _count(usage.get("prompt_tokens")),
            _count(usage.get("completion_tokens")),
        )

    def _known_names(self) -> list[str]:
        try:
            return self._endpoint.models()
        except RemoteError as error:
            if error.status in (404, 405, 501):  # no such route; its chat may be there all the same
                return []
            raise

    def _explained(self, error: RemoteError) -> RemoteError:
        if error.status != 404:
            return error
        names = ", ".join(self._names[:10]) or "none that it names"
        hint = did_you_mean(self.name, self._names)
        return RemoteError(f"{error}: --chat-model is {self.name!r}; known there: {names}{hint}")

    def _wait(self, seconds: float) -> None:
        if self._sleep is time.sleep:
            self._stopped.wait(seconds)
        else:
            self._sleep(seconds)
        if self._stopped.is_set():
            raise StoppedError


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
