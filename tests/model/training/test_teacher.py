"""The teacher's shards: which are made, and which are made anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model.training import teacher


@pytest.mark.parametrize(
    ("rows", "texts", "made"),
    [
        ([4, 2], 6, []),
        ([4, 2], 5, []),  # the first so many alone are asked for: nothing is lost
        ([4, 2], 9, ["00001", "00002"]),  # the file has grown: two rows are not its second shard
        ([4], 6, ["00001"]),
        ([], 3, ["00000"]),
    ],
)
def test_a_shard_of_fewer_texts_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[int], texts: int, made: list[str]
) -> None:
    monkeypatch.setattr(teacher, "SHARD", 4)
    for number, count in enumerate(rows):
        np.save(tmp_path / f"{number:05}.npy", np.zeros((count, 3), dtype=np.float16))
    found = dict(teacher.missing_shards([f"text {n}" for n in range(texts)], tmp_path))
    assert [path.stem for path in found] == made
    for path, some in found.items():
        first = 4 * int(path.stem)
        assert list(some) == [f"text {n}" for n in range(first, min(first + 4, texts))]


def test_a_broken_shard_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "00000.npy").write_bytes(b"\x93NUMPY")
    assert len(list(teacher.missing_shards(["a"], tmp_path))) == 1
