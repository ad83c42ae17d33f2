"""The actors of `encode --engine ray`, run in this process by what stands in for Ray."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from model.errors import CheckpointError, FileError
from model.extras import how_to_install
from model.user_files import TEMPORARY
from server import cli
from server.cli import encode as command
from server.errors import SettingsError
from server.offline import encode
from server.offline.crew import Failure
from server.offline.inputs import opened
from server.offline.ledger import Ledger
from server.offline.parts import OutputError, SliceEnd, Written
from server.offline.reader import Input
from server.offline.shard_writer import Recipe
from server.offline.slices import Slice
from server.offline.sources import ChangedError
from server.ray import actors
from tests.server.processes import free_ports
from tests.server.questions import RUNNERS

pytestmark = pytest.mark.whole
Encode = Callable[..., int]


def sent(what: Any) -> Any:
    """As it is when it has gone to another process."""
    return pickle.loads(pickle.dumps(what))  # noqa: S301


class InThisProcess:
    """Two actors, to which slices go in turn and from the last; all that passes is pickled. It
    stops after `most` slices."""

    most = 1_000

    def __init__(self, recipe: Recipe) -> None:
        self._place = actors._Place(str(Path.cwd()), "cpu", 1)
        self._recipe: Recipe = sent(recipe)
        self.info = actors._taken(actors._how_it_runs(self._place, self._recipe))

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def write(
        self, slices: Sequence[Slice], inputs: Sequence[Input], ledger: Ledger
    ) -> Iterator[Written | SliceEnd]:
        work = actors._Work(self._place, self._recipe, self.info, tuple(inputs), ledger)
        both = [actors._SliceWriter(sent(work)) for _ in range(2)]
        for number, one in enumerate(reversed(slices)):
            if number == self.most:
                raise KeyboardInterrupt
            for said in both[number % 2]({"slice": [pickle.dumps(one)]}):
                yield actors._taken(pickle.loads(said["found"][0]))  # noqa: S301


class Untidy(InThisProcess):
    """Another actor was killed while it wrote."""

    def write(
        self, slices: Sequence[Slice], inputs: Sequence[Input], ledger: Ledger
    ) -> Iterator[Written | SliceEnd]:
        (self._recipe.job.target / f"{TEMPORARY}of-an-actor").write_bytes(b"half a shard")
        yield from super().write(slices, inputs, ledger)


class Impatient(InThisProcess):
    most = 2


@pytest.fixture
def encoded(golden_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Encode:
    """Runs the command in `tmp_path`, by the actors of `crew` or, without one, as ever."""
    monkeypatch.chdir(tmp_path)
    usual = encode.run

    def run(*arguments: str, crew: type[InThisProcess] | None = None) -> int:
        monkeypatch.setattr(encode, "run", lambda namespace: usual(namespace, crew))
        options = ["--model", str(golden_checkpoint), "--runner", f"{RUNNERS}Hashing"]
        return cli.main(["encode", *arguments, "--device", "cpu", "--threads", "1", *options])

    return run


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def write_rows(count: int) -> None:
    Path("in.txt").write_text("".join(f"row {number} of {count}\n" for number in range(count)))


def test_actors_write_what_one_process_writes(encoded: Encode) -> None:
    write_rows(500)
    options = ["in.txt", "--shard-size", "4"]  # slices of 2,048 bytes
    assert encoded(*options, "-o", "one/") == 0
    assert encoded(*options, "-o", "actors/", crew=InThisProcess) == 0
    assert len(contents("actors")) > 100
    assert contents("actors") == contents("one")


def test_either_goes_on_with_what_the_other_has_begun(encoded: Encode) -> None:
    write_rows(500)
    options = ["in.txt", "--shard-size", "4", "-o"]
    assert encoded(*options, "one/") == 0
    assert encoded(*options, "begun/", crew=Impatient) == 130
    kept = {name: data for name, data in contents("begun").items() if name.endswith(".npy")}
    assert 0 < len(kept) < len(contents("one")) / 2
    before = {name: (Path("begun") / name).stat().st_ino for name in kept}
    assert encoded(*options, "begun/", "--resume") == 0
    assert contents("begun") == contents("one")
    (Path("begun") / "part-00001-00000.npy").unlink()
    assert encoded(*options, "begun/", "--resume", crew=Untidy) == 0
    assert contents("begun") == contents("one")
    assert all((Path("begun") / name).stat().st_ino == node for name, node in before.items())


def test_a_row_that_is_refused_ends_the_run_in_our_words(
    encoded: Encode, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("in.txt").write_text("a\nb\n" + "word " * 40_000 + "\n")
    assert encoded("in.txt", "-o", "out/", crew=InThisProcess) == 1
    assert "in.txt, line 3: the input has 40003 tokens" in capsys.readouterr().err


class Later(InThisProcess):
    """The inputs are others when the actors begin."""

    def write(
        self, slices: Sequence[Slice], inputs: Sequence[Input], ledger: Ledger
    ) -> Iterator[Written | SliceEnd]:
        self.between()
        yield from super().write(slices, inputs, ledger)

    @staticmethod
    def between() -> None: ...


@pytest.mark.parametrize("named", ["in/*.txt", "in"])
def test_actors_read_the_planned_files_and_not_what_has_come_since(
    encoded: Encode, named: str
) -> None:
    Path("in").mkdir()
    for number in (1, 2, 3):
        Path(f"in/{number}.txt").write_text(f"{number} a\n{number} b\n" * 100)
    options = [named, "--shard-size", "2"]
    assert encoded(*options, "-o", "one/") == 0

    class Added(Later):
        @staticmethod
        def between() -> None:
            Path("in/0.txt").write_text("a new file\n")

    assert encoded(*options, "-o", "actors/", crew=Added) == 0
    assert contents("actors") == contents("one")


def rewritten() -> None:
    Path("2.txt").write_text("another\n")


def of_another_time() -> None:
    os.utime("2.txt", ns=(1, 1))


def replaced() -> None:
    times = Path("2.txt").stat()
    Path("new").write_text("row 2\n")
    os.utime("new", ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace("new", "2.txt")


def gone() -> None:
    Path("2.txt").unlink()


@pytest.mark.parametrize(
    ("between", "said"),
    [
        (rewritten, "2.txt changed while it was read"),
        (of_another_time, "2.txt changed while it was read"),
        (replaced, "2.txt changed while it was read"),
        (gone, "2.txt: No such file or directory"),
    ],
)
def test_an_input_that_is_another_when_actors_begin_ends_the_run(
    encoded: Encode,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    between: Callable[[], None],
    said: str,
) -> None:
    for number in (1, 2, 3):
        Path(f"{number}.txt").write_text(f"row {number}\n")
    monkeypatch.setattr(Later, "between", staticmethod(between))
    assert encoded("1.txt", "2.txt", "3.txt", "-o", "out/", crew=Later) == 1
    assert capsys.readouterr().err == f"nv-embed encode: {said}\n"


@pytest.mark.parametrize("kind", [SettingsError, CheckpointError, FileError, OutputError])
def test_what_an_actor_fails_with_keeps_its_kind(kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"^there is no file a$"):
        actors._taken(sent(Failure.of(kind("there is no file a"))))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["in.txt", "-o", "out.npy", "--engine", "ray"], "--engine ray needs a folder"),
        (["-", "-o", "out/", "--engine", "ray"], "--engine ray needs files"),
        (["in.txt", "-o", "out/", "--engine", "ray", "--part", "1/2"], "Ray shares the work"),
        (["in.txt", "-o", "out/", "--actors", "2"], "--actors is for --engine ray"),
        (["in.txt", "-o", "out/", "--engine", "ray", "--actors", "3:2"], "must be N or MIN:MAX"),
        (["in.txt", "-o", "out/", "--engine", "ray", "--devices", "cpu,cpu"], "one device"),
        (["in.txt", "-o", "out/", "--engine", "ray"], how_to_install("ray")),
    ],
)
def test_what_is_refused(
    arguments: list[str],
    said: str,
    golden_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(3)
    assert cli.main(["encode", *arguments, "--model", str(golden_checkpoint)]) == 2
    assert said in capsys.readouterr().err
    assert not Path("out").exists()


def test_actors_are_a_number_or_two() -> None:
    assert command._actors("2") == (2, 2)
    assert command._actors("1:8") == (1, 8)


def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    (port,) = free_ports(1)
    with pytest.raises(SettingsError, match=f"RAY_ADDRESS=127.0.0.1:{port}: no cluster answers"):
        actors._refuse_silence(f"127.0.0.1:{port}")
    for address in ("", "auto", "ray://head:10001"):
        actors._refuse_silence(address)


def test_a_shared_file_may_have_another_number_on_another_machine(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text\n")
    with opened([str(path)]) as (source,):
        here = Input.of(source)
        there = here._replace(number=(7, 7), machine="another")
        assert there.reopened(source) is here.reopened(source) is source
        for changed in (there._replace(changed=1), there._replace(size=1)):
            with pytest.raises(ChangedError, match=r"a\.txt changed while it was read"):
                changed.reopened(source)
