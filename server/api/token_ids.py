"""Token ids in the place of a text: refused, used as they are, or read as those of cl100k_base.

Ids cannot be told apart by looking: LangChain sends OpenAI's by default, and a few of its texts
have ids that could be this model's, and mean other words. So somebody has to say whose they are:
the operator (--token-ids) or the request (`token_ids`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from server.engine.interface import Input
from server.errors import InvalidRequestError, SettingsError

Whose = Literal["reject", "model", "cl100k"]
_NAME = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
"""Of the file of ranks in tiktoken's cache."""
_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
_PACKAGES = (
    "litellm/litellm_core_utils/tokenizers",
    "llama_index/core/_static/tiktoken_cache",
)
"""Which have it with them."""


class TokenIds:
    """How one server or run reads them."""

    def __init__(self, whose: Whose, ranks: Path | None = None) -> None:
        """ranks: the file of cl100k_base. Raises SettingsError where it is needed and not found."""
        self._whose = whose
        self._pieces = _pieces(_found(ranks), ranks is None) if whose == "cl100k" else None

    def read(
        self, inputs: Sequence[Input], asked: Whose | None, name: str = "input"
    ) -> Sequence[Input]:
        """asked: whose they are, by the request. Raises InvalidRequestError naming the input."""
        if not isinstance(inputs[0], list):  # they are not mixed
            return inputs
        whose = asked or self._whose
        if whose == "model":
            return inputs
        param = name if len(inputs) == 1 else f"{name}[0]"
        if whose == "reject" or self._pieces is None:
            remedy = "" if whose == "reject" else " (this server has no --token-ids cl100k)"
            raise InvalidRequestError(
                f"{param} holds token ids, and nothing says whose: send texts (LangChain's "
                'OpenAIEmbeddings: check_embedding_ctx_length=False), or token_ids: "model" for '
                f"ids of POST /tokenize{remedy}. Operators: --token-ids",
                param=param,
            )
        return [self._text(ids, name, i, len(inputs)) for i, ids in enumerate(inputs)]

    def _text(self, ids: Input, name: str, index: int, count: int) -> str:
        """Half a character at an end, where a list was cut, becomes U+FFFD."""
        assert isinstance(ids, list)
        assert self._pieces is not None
        try:
            return b"".join(map(self._pieces.__getitem__, ids)).decode(errors="replace")
        except KeyError as error:
            param = name if count == 1 else f"{name}[{index}]"
            raise InvalidRequestError(
                f"{param} holds {error.args[0]}, which is no id of cl100k_base", param=param
            ) from None


def _places() -> Iterator[Path]:
    if folder := os.environ.get("TIKTOKEN_CACHE_DIR"):
        yield Path(folder) / _NAME
    for folder in sys.path:
        yield from (Path(folder) / package / _NAME for package in _PACKAGES)


def _found(given: Path | None) -> Path:
    if given is not None:
        return given
    for path in _places():
        if path.is_file():
            return path
    packages = " or ".join(package.partition("/")[0] for package in _PACKAGES)
    raise SettingsError(
        "--token-ids cl100k needs the ranks of cl100k_base, and nothing is downloaded: name the "
        f"file by --tiktoken-ranks, put it into TIKTOKEN_CACHE_DIR (as {_NAME}), or install "
        f"{packages}"
    )


def _pieces(path: Path, is_official: bool) -> dict[int, bytes]:
    """Id -> bytes. Lines of `base64 rank`."""
    try:
        raw = path.read_bytes()
        if is_official and hashlib.sha256(raw).hexdigest() != _SHA256:
            raise SettingsError(f"{path} is not the file of cl100k_base's ranks: remove it")
        pairs = (line.split() for line in raw.splitlines() if line)
        pieces = {int(rank): base64.b64decode(piece, validate=True) for piece, rank in pairs}
    except OSError as error:
        raise SettingsError(f"--tiktoken-ranks: {path} cannot be read: {error.strerror}") from None
    except (ValueError, binascii.Error):
        pieces = {}
    if not pieces:
        raise SettingsError(f"--tiktoken-ranks: {path} has no lines of `base64 rank`")
    return pieces
