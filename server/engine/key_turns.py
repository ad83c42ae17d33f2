"""Whose turn it is: the names of keys in turn, and of each its requests. Pure.

Nobody waits behind all requests of another, however many these are. Knows of a request only the
name of its key.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import chain
from typing import Generic, Protocol, TypeVar


class Named(Protocol):
    key_name: str


NamedT = TypeVar("NamedT", bound=Named)


class KeyTurns(Generic[NamedT]):
    """As a deque, but for who comes first. With one name it is one."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, deque[NamedT]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def __bool__(self) -> bool:
        return bool(self._of)

    def __iter__(self) -> Iterator[NamedT]:
        return chain.from_iterable(self._of.values())

    def append(self, request: NamedT) -> None:
        """Behind the others of its name."""
        if (requests := self._of.get(request.key_name)) is not None:
            requests.append(request)
        else:
            self._of[request.key_name] = deque((request,))

    def appendleft(self, request: NamedT) -> None:
        """Before all."""
        self._of.setdefault(request.key_name, deque()).appendleft(request)
        self._of.move_to_end(request.key_name, last=False)

    def popleft(self) -> NamedT:
        """The first of the first name, which then comes last."""
        name, requests = next(iter(self._of.items()))
        request = requests.popleft()
        if requests:
            self._of.move_to_end(name)
        else:
            del self._of[name]
        return request

    def remove(self, request: NamedT) -> None:
        requests = self._of[request.key_name]
        requests.remove(request)
        if not requests:
            del self._of[request.key_name]
