"""What the head of a request must not be, and the bytes of a refusal. Pure."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from http import HTTPStatus

import orjson

from server.api.openai_errors import error_body
from server.errors import ServerError

_HOST = re.compile(rb"([\w.~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(:\d*)?[ \t]*", re.ASCII)


def problem_of(
    version: str,
    method: bytes,
    headers: Sequence[tuple[bytes, bytes]],
    header: Mapping[bytes, bytes],
) -> str | None:
    """What the parser lets pass, and RFC 9112 does not. header: by name, in lower case."""
    if version not in ("1.1", "1.0"):
        return f"HTTP/{version} is not spoken here, but HTTP/1.1"
    if method == b"CONNECT":
        return "CONNECT is for proxies"
    coding = header.get(b"transfer-encoding", b"chunked").strip().lower()
    if coding != b"chunked":
        return f"Transfer-Encoding: {coding[:64].decode('latin-1')!a} is not decoded here"
    if len(header) < len(headers):
        names = [name for name, _ in headers]
        for name in (b"host", b"authorization"):
            if names.count(name) > 1:
                return f"A request has one {name.decode()} header at most"
    host = header.get(b"host")
    if host is None:
        return None if version == "1.0" else "The host header is missing"
    return None if _HOST.fullmatch(host) else "The host header is malformed"


def refusal(error: ServerError) -> bytes:
    """A whole answer, the last of its connection."""
    body = orjson.dumps(error_body(error))
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "x-request-id": uuid.uuid4().hex,
        **error.headers(),
        "connection": "close",
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    status = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
    return f"{status}{head}\r\n".encode() + body
