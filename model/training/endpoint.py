"""JSON to and from a server that speaks OpenAI's API.

Owns what goes wrong on the way: each refusal becomes one sentence, an overloaded server is waited
for. Knows nothing of what is asked.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.message import Message
from typing import Any

from model.errors import ModelError, UnsupportedError

ATTEMPTS = 8
_BUSY = (429, 502, 503, 504)
_NO_JSON = (json.JSONDecodeError, UnicodeDecodeError, RecursionError)
_MOST_WAIT_S = 60.0
_TIMEOUT_S = 600


class RemoteError(ModelError):
    """A server refused, or could not be reached; says which one and why.

    `status` is that of the answer, None when there was none; `code` what the server calls it.
    """

    def __init__(self, message: str, status: int | None = None, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class NoJSONError(RemoteError):
    """What a server answered is no JSON."""


class TooLargeError(RemoteError):
    """413: the request's body is larger than the server takes."""


class Endpoint:
    """One server. May be asked by several threads at a time."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        key_option: str = "--api-key, or NV_EMBED_API_KEY",
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """url: with or without /v1; key_option: where a user says the key.

        Raises UnsupportedError for an address that is none.
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise UnsupportedError(f"{url} is not an http address")
        self._api_key, self._key_option, self._sleep = api_key, key_option, sleep

    def models(self) -> list[str]:
        """The names that the server gives to what it serves. Raises RemoteError."""
        try:
            return [str(item["id"]) for item in self.call("/v1/models")["data"]]
        except (KeyError, TypeError):
            raise RemoteError(f"{self.url}/v1/models names no model") from None

    def call(
        self, path: str, body: dict[str, Any] | None = None, *, patient: bool = False
    ) -> dict[str, Any]:
        """The answer's JSON. After a 429 or 503 it waits as `retry-after` says, and asks again.

        patient: also after a 500, a lost connection and an answer that is cut: the server has been
        seen alive, and what was asked changes nothing there. Raises RemoteError.
        """
        for attempt in range(1, ATTEMPTS + 1):
            last = attempt == ATTEMPTS
            try:
                return self._ask(path, body)
            except urllib.error.HTTPError as error:
                last = last or error.headers.get("x-should-retry") == "false"
                if last or not (error.code in _BUSY or (patient and error.code == 500)):
                    raise self._refusal(error) from None
                wait = _wait_s(error.headers, attempt)
            except (OSError, ValueError, http.client.HTTPException, RecursionError) as error:
                # No address, nobody there, a reset, an answer that is cut or without JSON.
                if last or not patient:
                    reason = getattr(error, "reason", error)
                    said = str(reason) or repr(reason)
                    kind = NoJSONError if isinstance(error, _NO_JSON) else RemoteError
                    raise kind(f"{self.url} does not answer as a server: {said}") from None
                wait = _wait_s(Message(), attempt)
            self._sleep(wait)
        raise AssertionError(ATTEMPTS)

    def _ask(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        data = None if body is None else json.dumps(body).encode()
        # http and https alone, see __init__
        request = urllib.request.Request(self.url + path, data, headers)  # noqa: S310
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:  # noqa: S310
            return json.loads(response.read())  # type: ignore[no-any-return]

    def _refusal(self, error: urllib.error.HTTPError) -> RemoteError:
        said, code = _message(error)
        if self._api_key:  # some repeat it
            said = said.replace(self._api_key, "…")
        if error.code == 401:
            text = f"{self.url} wants a valid key: {self._key_option} ({said})"
        elif error.code == 413:
            return TooLargeError(f"{self.url}: a single text is too large for it ({said})", 413)
        elif error.code == 429:
            text = f"{self.url} is still overloaded after {ATTEMPTS} tries ({said})"
        else:
            text = f"{self.url} answered {error.code}: {said}"
        return RemoteError(text, error.code, code)


def _message(error: urllib.error.HTTPError) -> tuple[str, str]:
    """What an error's body says, in OpenAI's envelope or not, one short line; and its code."""
    body = code = ""
    try:
        body = error.read().decode("utf-8", errors="replace")
        envelope = json.loads(body)["error"]
        said = str(envelope["message"])
        code = str(envelope.get("code", ""))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        said = body
    except (OSError, http.client.HTTPException):  # the connection ended first
        said = ""
    return " ".join(said.split())[:300] or str(error.reason), code


def _wait_s(headers: Message, attempt: int) -> float:
    """Seconds that the server asks for, at most 60; without its word 1, 2, 4, …"""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except (TypeError, ValueError):  # absent, or a date
            continue
        if seconds >= 0:
            return min(seconds, _MOST_WAIT_S)
    return float(min(2 ** (attempt - 1), _MOST_WAIT_S))
