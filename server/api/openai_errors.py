"""OpenAI's shape of an error, in which all are answered that no dialect of its own answers."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import Response

from server.errors import ServerError


def error_body(error: ServerError) -> dict[str, Any]:
    """The one envelope; and `detail`, by which voyageai's client tells errors apart."""
    return {
        "detail": error.message,
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        },
    }


def error_response(error: ServerError) -> Response:
    return error_in(error_body(error), error)


def error_in(body: object, error: ServerError) -> Response:
    """An error in a dialect's own body; status and headers are the same in all."""
    return Response(
        orjson.dumps(body), error.status, headers=error.headers(), media_type="application/json"
    )
