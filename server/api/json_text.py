"""JSON bytes -> Python values, by the same rules for HTTP bodies, JSON lines and batch files.

Where producers differ from RFC 8259 the text is read, not refused: a byte order mark is skipped,
NaN and Infinity are numbers (a field that is used refuses them by its type), and half of a
surrogate pair, as of an emoji that was cut, is U+FFFD, which is what encoders to UTF-8 write for
it. Knows nothing of fields.
"""

from __future__ import annotations

import json
from typing import Any

import orjson

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class JSONTextError(ValueError):
    """These bytes are not JSON; the message says where and quotes nothing of them."""


def loads(data: bytes | bytearray) -> Any:
    """The one value that `data` holds. Raises JSONTextError."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        pass
    try:
        text = data.removeprefix(_BYTE_ORDER_MARK).decode()
        return _mended(json.loads(text))
    except RecursionError:
        raise JSONTextError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise JSONTextError(f"it is not UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise JSONTextError(f"{error}") from None
    except ValueError:  # the language's own limit on digits
        raise JSONTextError("a number has too many digits") from None


def _mended(value: Any) -> Any:
    """Without half pairs, in whatever it holds."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    elif isinstance(value, list):
        return [_mended(item) for item in value]
    elif isinstance(value, dict):
        return {_mended(name): _mended(item) for name, item in value.items()}
    return value
