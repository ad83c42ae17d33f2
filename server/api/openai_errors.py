"""OpenAI's shape of an error, in which all are answered that no dialect of its own answers."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import Response

from server.errors import ServerError


def error_body(error: ServerError) -> dict[str, Any]:
    """The one envelope."""
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def error_response(error: ServerError) -> Response:
    return Response(
        orjson.dumps(error_body(error)),
        error.status,
        headers=error.headers(),
        media_type="application/json",
    )
