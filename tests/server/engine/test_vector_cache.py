"""The exact cache: bytes, order, exactness."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model.batch import Encoding
from server.engine.vector_cache import VectorCache


def row(value: float) -> np.ndarray:
    return np.full(64, value, dtype=np.float32)


def test_nothing_is_kept_without_bytes() -> None:
    cache = VectorCache(0)
    cache.put(b"a", row(1))
    assert cache.get(b"a") is None


def test_the_least_recently_used_goes_first() -> None:
    cache = VectorCache(1200)  # two rows of 256 bytes, their keys and their overhead
    cache.put(b"a", row(1))
    cache.put(b"b", row(2))
    assert cache.get(b"a") is not None
    cache.put(b"c", row(3))
    assert cache.get(b"b") is None
    assert [cache.get(key)[0] for key in (b"a", b"c")] == [1, 3]  # type: ignore[index]


def test_the_rest_of_a_batch_is_not_kept_alive() -> None:
    batch = np.zeros((100, 64), dtype=np.float32)
    cache = VectorCache(10_000)
    cache.put(b"a", batch[3])
    kept = cache.get(b"a")
    assert kept is not None
    assert kept.base is None


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 40)), max_size=60))
def test_it_never_holds_more_than_its_bytes(puts: list[tuple[int, int]]) -> None:
    cache = VectorCache(3000)
    for number, length in puts:
        key = bytes([number]) * length
        cache.put(key, row(number))
        assert 0 <= cache.used <= cache.limit
        assert (cache.used == 0) == (len(cache) == 0)
        kept = cache.get(key)
        assert kept is None or kept[0] == number


def test_keys_tell_ids_and_pool_apart() -> None:
    ids = np.arange(1, 9, dtype=np.int32)
    keys = [Encoding(ids).key, Encoding(ids, 1).key, Encoding(ids[:-1]).key, Encoding(ids + 1).key]
    assert len(set(keys)) == 4
    assert Encoding(ids.copy()).key == keys[0]
