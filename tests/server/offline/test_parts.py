"""What a run keeps on disk, and what it believes of it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from server.offline.ledger import ForgottenError, Ledger
from server.offline.parts import Parts, Proof, Shard, SliceEnd, Written

SHARD = Shard(2, 0, 20, 10, "ab" * 32)
REFUSING = Written(2, 0, 20, 10, 9, 4, "ab", "cd", ((3, 0, 4, "why"),))
ROWS = np.arange(40, dtype=np.float32).reshape(10, 4)


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    parts = Parts(tmp_path / "out.npy.parts", ".npy", 0o600)
    parts.make()
    return parts


def test_batches_are_kept_when_it_is_time(parts: Parts) -> None:
    file = parts.folder / ".part-00002-00000.kept"
    at_once, later = parts.keeper(SHARD, 4, every=0), parts.keeper(SHARD, 4, every=1000)
    later.add([0], ROWS[:1])
    assert not file.exists()
    at_once.add([7, 3], ROWS[[7, 3]])
    assert file.exists()
    assert (at_once.rows, later.rows) == (2, 0)
    vectors = np.zeros_like(ROWS)
    assert parts.keeper(SHARD, 4, every=0).recall(vectors) == {3, 7}
    np.testing.assert_array_equal(vectors[[3, 7]], ROWS[[3, 7]])
    assert not vectors[[0, 1, 2, 4, 5, 6, 8, 9]].any()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
def test_what_is_done_is_kept_on_the_way_out(parts: Parts, error: type[BaseException]) -> None:
    keeper = parts.keeper(SHARD, 4, every=1000)
    keeper.add([1], ROWS[1:2])
    with pytest.raises(error), keeper:
        raise error
    assert keeper.rows == 1
    assert parts.keeper(SHARD, 4, every=0).recall(np.zeros_like(ROWS)) == {1}


def test_kept_rows_of_something_else_are_forgotten(parts: Parts) -> None:
    for other in (
        parts.keeper(dataclasses.replace(SHARD, digest="cd" * 32), 4, every=0),  # other rows
        parts.keeper(SHARD, 5, every=0),  # another width
    ):
        parts.keeper(SHARD, 4, every=0).add([1], ROWS[1:2])
        assert other.recall(np.zeros((10, other._width), dtype=np.float32)) == set()
        assert not (parts.folder / ".part-00002-00000.kept").exists()


def test_a_record_that_was_cut_off_costs_itself_alone(parts: Parts) -> None:
    file = parts.folder / ".part-00002-00000.kept"
    keeper = parts.keeper(SHARD, 4, every=0)
    keeper.add([1], ROWS[1:2])
    whole = file.stat().st_size
    keeper.add([2], ROWS[2:3])
    for cut in range(whole, file.stat().st_size):
        raw = file.read_bytes()
        os.truncate(file, cut)
        again = parts.keeper(SHARD, 4, every=0)
        assert again.recall(np.zeros_like(ROWS)) == {1}
        again.add([5], ROWS[5:6])  # where the broken one was
        assert parts.keeper(SHARD, 4, every=0).recall(np.zeros_like(ROWS)) == {1, 5}
        file.write_bytes(raw)


def test_a_ledger_remembers_what_was_noted(parts: Parts) -> None:
    with parts.replacing(parts.path(SHARD.key)) as file:
        file.write(b"rows")
        proof = Proof.of(file, SHARD.digest)
    written = Written(2, 0, 20, 10, 9, proof.size, proof.sha256, proof.made_of, ((3, 0, 4, "why"),))
    end = SliceEnd(2, 1, ((10, 11),))

    def note() -> None:
        ledger = Ledger(parts, "run")
        ledger.open()
        ledger.note(written)
        ledger.note(end)

    def known(run: str = "run") -> Ledger:
        ledger = Ledger(parts, run)
        ledger.read()
        return ledger

    note()
    assert known().has(SHARD)
    assert (known().shards, known().ends) == ({(2, 0): written._replace(refused=())}, {2: end})
    assert known().refused(known().shards[2, 0]) == written.refused
    for other in ({"digest": "cd" * 32}, {"first": 21}, {"rows": 9}):
        assert not known().has(dataclasses.replace(SHARD, **other))
    assert not known("another run").has(SHARD)
    ledger = parts.folder / ".ledger.jsonl"
    whole = ledger.read_bytes()
    for broken in (b"", whole[:-90], b"[]\n5\nnull\n{}\n", os.urandom(50)):
        ledger.write_bytes(broken)
        assert not known().has(SHARD)
        note()  # on a line of its own
        assert known().has(SHARD)


def test_a_changed_line_of_a_ledger_is_none(parts: Parts) -> None:
    """Whatever the change: a number that still is one, too. The work is done again."""
    ledger = Ledger(parts, "run")
    ledger.open()
    ledger.note(REFUSING)
    ledger.note(SliceEnd(2, 1, ((10, 11),)))
    whole = parts.ledger.read_bytes()
    begin = whole.index(b"\n") + 1
    for at in range(begin, len(whole)):
        raw = bytearray(whole)
        raw[at] ^= 1
        parts.ledger.write_bytes(raw)
        again = Ledger(parts, "run")
        again.read()
        found = (again.shards.values(), again.ends.values())
        assert sum(map(len, found)) <= 1, raw
        for one in again.shards.values():
            assert again.refused(one) == REFUSING.refused
        assert {*again.ends} <= {2}


def test_what_was_refused_stays_on_disk_and_is_told_of_a_shard(parts: Parts) -> None:
    """Also by a ledger that was begun anew with it, and by the one that stays at the end."""
    ledger = Ledger(parts, "run")
    ledger.open()
    for number in range(5):
        ledger.note(REFUSING._replace(number=number, refused=((number, 0, 4, "why"),)))
    assert all(one.refused == () for one in ledger.shards.values())
    again = Ledger(parts, "run")
    again.read()
    again.open()
    again.keep(again.shards)
    parts.ledger.unlink()
    kept = Ledger(parts, "run")
    kept.read()
    for one in (again, kept):
        assert len(one.shards) == 5
    for key, shard in kept.shards.items():
        assert kept.refused(shard) == ((key[1], 0, 4, "why"),)
        with pytest.raises(ForgottenError, match="changed while they were read"):
            again.refused(shard)  # its own is gone
    other = Ledger(parts, "run", {REFUSING.key: REFUSING._replace(refused=())})
    assert not other.tells_refused(other.shards[REFUSING.key])
    other.open()
    assert other.shards == {}
    for number in (7, 8):
        kept.note(REFUSING._replace(number=number))  # its own is gone, too
    kept.keep(kept.shards)
    parts.ledger.unlink()  # what it has noted itself is told by the one that stays
    kept.note(REFUSING._replace(number=9))
    assert len(kept.shards) == 8
    assert all(kept.refused(shard) for shard in kept.shards.values())


def test_writers_read_each_others_ledgers(tmp_path: Path) -> None:
    first, second = (Parts(tmp_path / "out", ".npy", 0o600, f"{n}-of-2") for n in (1, 2))
    first.make()
    for parts, number in ((first, 0), (second, 1)):
        ledger = Ledger(parts, "run")
        ledger.read()
        ledger.open()
        ledger.note(SliceEnd(number, 1, ((5, 5),)))
    again = Ledger(first, "run")
    again.read()
    assert sorted(again.ends) == [0, 1]
    with second.replacing(second.path((1, 0))) as file:
        file.write(b"half")
        first.sweep()  # what another one is writing stays
        assert any(name.startswith(".nv-embed-") for name in os.listdir(tmp_path / "out"))


def test_what_others_have_copied_does_not_replace_what_was_written_since(tmp_path: Path) -> None:
    """Of an input that was edited, and kept its size."""
    first, second = (Parts(tmp_path / "out", ".npy", 0o600, f"{n}-of-2") for n in (1, 2))
    first.make()
    mine, theirs = Ledger(first, "run"), Ledger(second, "run")
    mine.open()
    mine.note(REFUSING)
    mine.note(SliceEnd(2, 1, ((10, 11),)))
    theirs.read()
    theirs.open()
    now = REFUSING._replace(made_of="of other rows", refused=((4, 0, 5, "why"),))
    mine.note(now)
    mine.note(SliceEnd(2, 1, ((10, 10),)))
    theirs.note(REFUSING._replace(slice=3))
    mine.read()
    assert mine.refused(mine.shards[REFUSING.key]) == now.refused
    assert mine.ends[2].spans == ((10, 10),)
    assert len(mine.shards) == 2


def test_proof_needs_a_regular_file_of_these_bytes(parts: Parts, tmp_path: Path) -> None:
    path = parts.path((0, 0))
    with parts.replacing(path) as file:
        file.write(b"rows")
        proof = Proof.of(file)
    assert proof.holds(path)
    for raw in (b"row", b"rowz", b"rows!", b""):
        path.write_bytes(raw)
        assert not proof.holds(path)
    (tmp_path / "elsewhere").write_bytes(b"rows")
    path.unlink()
    assert not proof.holds(path)
    path.symlink_to(tmp_path / "elsewhere")
    assert not proof.holds(path)
    path.unlink()
    os.mkfifo(path)  # nobody writes to it
    assert not proof.holds(path)


def test_a_file_takes_its_name_whole_or_never(parts: Parts) -> None:
    target = parts.path((0, 0))
    names = set()
    for word in (b"first", b"second"):
        with parts.replacing(target) as file:
            file.write(word)
            names |= {path.name for path in parts.folder.iterdir()} - {target.name}
        assert target.read_bytes() == word
        assert target.stat().st_mode & 0o777 == 0o600
    assert len(names) == 2  # none that can be guessed
    with pytest.raises(ZeroDivisionError), parts.replacing(target) as file:
        file.write(b"%d" % (1 // 0))
    assert target.read_bytes() == b"second"
    assert [path.name for path in parts.folder.iterdir()] == [target.name]
