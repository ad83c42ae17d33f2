"""The numbers of a vector as a request wants them: dimensions, type, JSON or base64.

float32 and float16 are the vector itself. int8 is round(scale x) within -127 to 127, by one scale
for all vectors of a width (`int8_scale`), so that they are compared by their dot product as well;
uint8 is int8 + 128. ubinary has a bit a number, 1 where it is above 0, eight to a byte and the
first in the highest bit; binary is ubinary - 128 as int8. In base64, float32 and float16 are
little-endian unless big-endian is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import orjson
import pybase64
from numpy.typing import NDArray

from server.errors import InvalidRequestError

OutputDtype = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]
_LEAST_COSINE = 0.99
"""Of int8 to the vector. A number beyond the largest is cut off; usual vectors have none."""


def int8_scale(width: int) -> float:
    """127 for up to 256 dimensions, where 127 is 1.0; above them 127 is 16 times the root of the
    mean square of a vector of length 1."""
    return 127 * max(1.0, math.sqrt(width) / 16)


@dataclass(frozen=True, slots=True)
class VectorFormat:
    """How an answer holds its vectors."""

    dtype: OutputDtype = "float32"
    base64: bool = False
    big_endian: bool = False
    dimensions: int | None = None

    def check(self, width: int, allow_fewer: bool, trained: Sequence[int] = ()) -> None:
        """Raises InvalidRequestError for what a model of `width` cannot give.

        allow_fewer: every number below; otherwise those that the model was `trained` for.
        """
        wanted = self.dimensions or width
        if wanted > width or (wanted < width and not allow_fewer and wanted not in trained):
            hint = " (the server was started without --allow-truncated-dimensions)"
            hint = "" if wanted > width else hint
            known = " or ".join(map(str, (width, *trained)))
            raise InvalidRequestError(
                f"This model has {known} dimensions, {wanted} cannot be had{hint}",
                param="dimensions",
            )
        if self.dtype in ("binary", "ubinary") and wanted % 8:
            raise InvalidRequestError(
                f"{wanted} dimensions do not fill bytes, eight to each: {self.dtype} cannot be had",
                param="output_dtype",
            )

    def check_vectors(self, vectors: Sequence[NDArray[np.float32]]) -> None:
        """Raises InvalidRequestError where `dtype` would give another vector."""
        if self.dtype not in ("int8", "uint8"):
            return
        for index, vector in enumerate(vectors):
            row = cut(vector, self.dimensions)
            if np.abs(row).max() * int8_scale(len(row)) < 127.5:
                continue
            held = _int8(row).astype(np.float32)
            cosine = float(held @ row / np.linalg.norm(held))
            if cosine < _LEAST_COSINE:
                raise InvalidRequestError(
                    f"input[{index}] has a vector whose largest numbers {self.dtype} cannot hold "
                    f"(cosine {cosine:.3f}): ask for float32 or float16",
                    param="output_dtype",
                )

    def written(self, vector: NDArray[np.float32]) -> tuple[bytes, ...]:
        """As JSON, in parts to be joined: a list of numbers, or base64 in quotes, whose characters
        need no escaping."""
        row = cut(vector, self.dimensions)
        found = _NUMBERS[self.dtype](row)
        if not self.base64:
            return (orjson.dumps(np.ascontiguousarray(found), option=orjson.OPT_SERIALIZE_NUMPY),)
        order = found.dtype.newbyteorder(">" if self.big_endian else "<")
        ordered = np.ascontiguousarray(found, dtype=order)
        return b'"', pybase64.b64encode(ordered.data), b'"'


def cut(vector: NDArray[np.float32], dimensions: int | None) -> NDArray[np.float32]:
    """The first `dimensions` values, of length 1 again."""
    if dimensions is None or dimensions == len(vector):
        return vector
    head = vector[:dimensions]
    norm = float(np.linalg.norm(head))
    return (head / norm).astype(np.float32) if norm else head


def numbers(vectors: NDArray[np.float32], dtype: OutputDtype) -> NDArray[Any]:
    """A vector [D], or several [N, D], in another type."""
    return _NUMBERS[dtype](vectors)


def _int8(row: NDArray[np.float32]) -> NDArray[np.int8]:
    scaled = np.rint(row * np.float32(int8_scale(row.shape[-1])))
    found: NDArray[np.int8] = np.clip(scaled, -127, 127).astype(np.int8)
    return found


def _bits(row: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.packbits(row > 0, axis=-1)


_NUMBERS: Mapping[OutputDtype, Callable[[NDArray[np.float32]], NDArray[Any]]] = {
    "float32": lambda row: row,
    "float16": lambda row: row.astype(np.float16),
    "int8": _int8,
    "uint8": lambda row: (_int8(row).astype(np.int16) + 128).astype(np.uint8),
    "binary": lambda row: (_bits(row).astype(np.int16) - 128).astype(np.int8),
    "ubinary": _bits,
}
