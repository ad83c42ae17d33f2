"""The wanted fields of a large JSON object, read in pieces: counted before they become objects.

A parser that is given 32 MB holds the interpreter's lock for as long as it takes, and makes a
hundred bytes of objects of each `[],`. Here no call looks at more than STEP bytes, values that
nobody wants are passed over (only their strings and brackets are looked at), and a list that no
request may be as long as is refused where it passes the limit. Knows how `input` may be nested, not
what it means; on a thread of its own, the event loop goes on.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

from server.api.json_text import JSONTextError, loads
from server.errors import InvalidRequestError
from server.settings import MAX_REQUEST_INPUTS, MAX_REQUEST_TOKENS

STEP = 64 * 1024
"""Bytes that one call looks at; what is not larger is better read at once."""
KEPT_CHARS = 16 * MAX_REQUEST_TOKENS
"""Characters at each end of a text that are kept: pieces have no more than 16 characters, so
whatever truncation is asked for, nothing between them can be among a request's tokens."""
_LISTS = ("input", "inputs", "texts", "documents", "passages", "text_1", "text_2", "queries")
"""Fields of the dialects that may be lists of many texts."""
_MAX_FIELDS = 1000
_MAX_PASSED = 100_000
"""Strings, lists and objects in a value that nobody wants."""

_SPACE = re.compile(rb"[ \t\r\n]*+")
_NUMBERS = re.compile(rb"[-+.\w, \t\r\n]*+")
"""Numbers and their commas; and names, which the parser then judges."""
_NO_BRACKET = re.compile(rb'[^"\[\]{}]*+')
_SCALAR = re.compile(rb"[-+.\w]*+")
_CHARACTERS = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_TEXTS = re.compile(rb'(?:"(?:[^"\\]++|\\.)*+"[ \t\r\n]*+,[ \t\r\n]*+)++', re.DOTALL)
_WHOLE_CHARACTERS = re.compile(
    rb'(?:[^"\\]++|\\[^u]|\\u(?![dD][89abAB])[\da-fA-F]{4}'
    rb"|\\u[dD][89abAB][\da-fA-F]{2}\\u[dD][c-fC-F][\da-fA-F]{2}"
    rb"|\\u[dD][89abAB][\da-fA-F]{2}(?=.{6})(?!\\u[dD][c-fC-F]))*+",
    re.DOTALL,
)
"""Up to an escape that may be the first half of a pair whose second half is not in sight."""
_CLOSING = {ord("["): ord("]"), ord("{"): ord("}")}


def read_fields(
    body: bytes | bytearray,
    wanted: Collection[str],
    step: int = STEP,
    between: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Any], list[str]]:
    """-> (the wanted fields, the names of the others). step: see STEP; no number may be longer.
    between: called after each so many bytes.

    Raises JSONTextError, or InvalidRequestError naming a field that is too large.
    """
    return _Reader(body, step, between).read(wanted)


class _Reader:
    def __init__(self, body: bytes | bytearray, step: int, between: Callable[[], None]) -> None:
        self._body, self._end, self._step, self._between = body, len(body), step, between
        self._at = 3 if body.startswith(b"\xef\xbb\xbf") else 0
        self._stopped_at = 0

    def _stop(self) -> None:
        """Let others go on, if a step is done; in each loop over values or over their bytes."""
        if self._at - self._stopped_at >= self._step:
            self._stopped_at = self._at
            self._between()

    def read(self, wanted: Collection[str]) -> tuple[dict[str, Any], list[str]]:
        fields: dict[str, Any] = {}
        others: list[str] = []
        if self._peek() != ord("{"):
            self._pass_over("The body")
            raise InvalidRequestError("The body must be a JSON object")
        self._at += 1
        more = self._peek() != ord("}")
        while more:
            name = self._name()
            self._expect(b":")
            if name in wanted:
                fields[name] = self._value(name)
            else:
                others.append(name)
                self._pass_over(name[:100])
            if len(fields) + len(others) > _MAX_FIELDS:
                raise InvalidRequestError(f"The body has more than {_MAX_FIELDS} fields")
            more = self._peek() == ord(",")
            self._at += more
        self._expect(b"}")
        if self._peek() is not None:
            raise self._error("something follows the object")
        return fields, others

    def _name(self) -> str:
        if self._peek() != ord('"'):
            raise self._error("expected a name in quotes")
        begin = self._at
        self._pass_string()
        if self._at - begin > STEP:
            return self._body[begin + 1 : begin + 1 + STEP].decode(errors="replace")
        return str(self._loads(begin, self._at))

    def _value(self, name: str) -> Any:
        first = self._peek()
        if name in _LISTS and first == ord("["):
            return self._inputs(name)
        if first == ord('"'):
            return self._text()
        return self._small(name)

    def _small(self, name: str) -> Any:
        begin = self._at
        self._pass_over(name)
        if self._at - begin > STEP:
            raise InvalidRequestError(f"{name} is larger than any value of it", param=name)
        return self._loads(begin, self._at)

    def _inputs(self, name: str) -> list[Any]:
        """Texts, small objects that hold one, lists of ids, or the ids of one input."""
        items: list[Any] = []
        num_ids = 0
        self._at += 1
        first = self._peek()
        more = first not in (ord("]"), None)
        if first is not None and more and first not in b'"[{':
            items, more = self._numbers(name), False
        while more:
            first = self._peek()
            if first == ord('"'):
                if texts := _TEXTS.match(self._body, self._at, self._at + self._step):
                    comma = self._body.rfind(b",", self._at, texts.end())
                    items += self._loads(self._at, comma, b"[", b"]")
                    self._at = comma
                else:
                    items.append(self._text())
            elif first == ord("["):
                self._at += 1
                items.append(self._numbers(f"{name}[{len(items)}]"))
                self._expect(b"]")
                num_ids += len(items[-1])
            elif first == ord("{"):
                items.append(self._small(f"{name}[{len(items)}]"))
            else:
                raise InvalidRequestError(f"{name} holds neither texts nor token ids", param=name)
            if len(items) > MAX_REQUEST_INPUTS:
                raise InvalidRequestError(
                    f"{name} has more than {MAX_REQUEST_INPUTS} items, which is the limit",
                    param=name,
                )
            if num_ids > MAX_REQUEST_TOKENS:
                raise _too_many_ids()
            more = self._peek() == ord(",")
            self._at += more
        self._expect(b"]")
        return items

    def _numbers(self, param: str) -> list[Any]:
        """What is left of a list that holds nothing but numbers."""
        items: list[Any] = []
        after_comma = False
        while True:
            self._stop()
            begin = self._at
            match = _NUMBERS.match(self._body, begin, begin + self._step)
            assert match is not None
            end = match.end()
            last = end < begin + self._step or end == self._end
            if last:
                self._at = end
                if self._body[end : end + 1] in (b'"', b"[", b"{"):
                    raise InvalidRequestError(
                        f"{param} must hold token ids, which are integers", param=param
                    )
            else:  # the last number may go on
                end = self._body.rfind(b",", begin, end)
                if end < 0:
                    raise self._error("expected numbers")
                self._at = end + 1
            found = self._loads(begin, end, b"[", b"]")
            if after_comma and not found:
                raise self._error("expected a value")
            items += found
            if len(items) > MAX_REQUEST_TOKENS:
                raise _too_many_ids()
            if last:
                return items
            after_comma = True

    def _text(self) -> str:
        """A string; of one that is very long only both ends."""
        head: list[str] = []
        tail: deque[str] = deque()
        num_head = num_tail = 0
        self._at += 1
        while True:
            self._stop()
            piece = self._piece()
            if piece is None:
                break
            if num_head < KEPT_CHARS:
                head.append(piece)
                num_head += len(piece)
            else:
                tail.append(piece)
                num_tail += len(piece)
                while num_tail - len(tail[0]) >= KEPT_CHARS:
                    num_tail -= len(tail.popleft())
        self._at += 1
        return head[0] if len(head) == 1 else "".join([*head, *tail])

    def _piece(self) -> str | None:
        """The next characters of the string that is being read; None at its end."""
        body, begin = self._body, self._at
        match = _WHOLE_CHARACTERS.match(body, begin, begin + self._step)
        assert match is not None
        end = match.end()
        if end == begin:
            if end >= self._end:
                raise self._error("a string has no end")
            if body[end] == ord('"'):
                return None
            # Half a pair, or no escape at all: the parser knows.
            end = min(begin + (6 if body[begin + 1 : begin + 2] == b"u" else 2), self._end)
        elif end == begin + self._step < self._end:  # not in the midst of a character
            while end > begin + self._step - 4 and body[end] & 0xC0 == 0x80:
                end -= 1
        self._at = end
        return str(self._loads(begin, end, b'"', b'"'))

    # What nobody wants

    def _pass_over(self, what: str) -> None:
        """One value, of which strings and brackets are looked at, and counted."""
        first = self._peek()
        if first == ord('"'):
            self._pass_string()
            return
        if first not in _CLOSING:
            begin = self._at
            match = _SCALAR.match(self._body, begin, begin + self._step)
            assert match is not None
            self._at = match.end()
            self._loads(begin, self._at)
            return
        open_brackets = bytearray()
        passed = 0
        while True:
            self._stop()
            match = _NO_BRACKET.match(self._body, self._at, self._at + self._step)
            assert match is not None
            self._at = match.end()
            if self._at >= self._end:
                raise self._error("a list or an object has no end")
            byte = self._body[self._at]
            if byte == ord('"'):
                self._pass_string()
                passed += 1
            elif byte in _CLOSING:
                open_brackets.append(_CLOSING[byte])
                self._at += 1
                passed += 1
            elif byte in _CLOSING.values():
                if open_brackets.pop() != byte:
                    raise self._error("the wrong bracket")
                self._at += 1
                if not open_brackets:
                    return
            if len(open_brackets) > _MAX_FIELDS:
                raise self._error("it is nested too deeply")
            if passed > _MAX_PASSED:
                raise InvalidRequestError(f"{what} holds more than {_MAX_PASSED} values")

    def _pass_string(self) -> None:
        self._at += 1
        while True:
            self._stop()
            match = _CHARACTERS.match(self._body, self._at, self._at + self._step)
            assert match is not None
            if match.end() == self._at:
                break  # a quote, or an escape that the end cut off
            self._at = match.end()
        if self._body[self._at : self._at + 1] != b'"':
            raise self._error("a string has no end")
        self._at += 1

    # Bytes

    def _peek(self) -> int | None:
        """The next byte that is no space."""
        while True:
            self._stop()
            match = _SPACE.match(self._body, self._at, self._at + self._step)
            assert match is not None
            stopped = match.end() < self._at + self._step
            self._at = match.end()
            if self._at >= self._end:
                return None
            if stopped:
                return self._body[self._at]

    def _expect(self, byte: bytes) -> None:
        if self._peek() != byte[0]:
            raise self._error(f"expected {byte.decode()}")
        self._at += 1

    def _loads(self, begin: int, end: int, before: bytes = b"", after: bytes = b"") -> Any:
        try:
            return loads(b"".join((before, self._body[begin:end], after)))
        except JSONTextError as error:
            raise JSONTextError(f"{error} of what begins at byte {begin + 1}") from None

    def _error(self, words: str) -> JSONTextError:
        return JSONTextError(f"{words} (byte {self._at + 1})")


def _too_many_ids() -> InvalidRequestError:
    return InvalidRequestError(
        f"input has more than {MAX_REQUEST_TOKENS} token ids, which is the limit of one request",
        param="input",
    )
