"""`nv-embed encode --engine ray`: the slices of a run, dealt by Ray Data to actors with a model.

A row of the dataset is a slice, and what comes back is what was noted of its shards: texts and
vectors stay where they are read and written. Ray replaces an actor that dies and deals its slices
anew; shards are the same to the byte whoever writes them, and take their names when they are whole.
"""

from __future__ import annotations

import logging
import os
import pickle
import platform
import re
import socket
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, overload

from model.batch import RunnerInfo
from model.extras import how_to_install
from model.user_files import open_regular
from server.errors import SettingsError
from server.offline import call
from server.offline.crew import Failure, refuse_another
from server.offline.inputs import is_url, opened
from server.offline.ledger import Ledger
from server.offline.manifest import Settled
from server.offline.parts import SliceEnd, Written
from server.offline.reader import Input
from server.offline.shard_writer import Recipe
from server.offline.slices import Slice
from server.offline.sources import Source

logger = logging.getLogger("nv_embed.encode")

_ANSWER_S = 10.0
_MOST_BLOCKS = 10_000
"""Blocks are what Ray deals, and repeats when an actor dies: one a slice, but not millions."""


class Actors:
    """See SliceCrew. On entering it one actor's worth of model is loaded, to know how it runs."""

    info: RunnerInfo

    def __init__(self, recipe: Recipe) -> None:
        """Raises SettingsError where Ray is not installed."""
        try:
            import ray.data  # noqa: F401  (a name of its own would be `ray`)
        except ImportError as error:
            raise SettingsError(f"--engine ray needs Ray Data: {how_to_install('ray')}") from error
        self._recipe, self._ends = recipe, ExitStack()

    def __enter__(self) -> Actors:
        import ray

        if not ray.is_initialized():
            _refuse_silence(os.environ.get("RAY_ADDRESS", ""))
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
            self._ends.callback(ray.shutdown)
        (device,) = self._recipe.arguments.devices
        if device == "auto":
            device = "cuda" if ray.cluster_resources().get("GPU") else "cpu"
        threads = (self._recipe.arguments.threads or 1) if device == "cpu" else None
        self._needs = {"num_cpus": threads or 1, "num_gpus": int(device != "cpu")}
        self._place = _Place(os.getcwd(), device, threads)
        ask = ray.remote(max_calls=1, **self._needs)(_how_it_runs)
        try:
            self.info = _taken(ray.get(ask.remote(self._place, self._recipe)))
        except BaseException:
            self._ends.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._ends.close()

    def write(
        self, slices: Sequence[Slice], inputs: Sequence[Input], ledger: Ledger
    ) -> Iterator[Written | SliceEnd]:
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        least, most = self._recipe.arguments.actors or (1, 1)
        settled = Settled(self.info.dtype, dict(self.info.products))
        recipe = replace(self._recipe, settled=settled)
        work = _Work(self._place, recipe, self.info, tuple(inputs), ledger)
        rows = [{"slice": pickle.dumps(one)} for one in slices]
        found = ray.data.from_items(
            rows, override_num_blocks=min(len(rows), _MOST_BLOCKS)
        ).map_batches(
            _SliceWriter,
            fn_constructor_args=(work,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most),
            **self._needs,
        )
        for row in found.iter_rows():
            yield _taken(pickle.loads(row["found"]))  # noqa: S301  (of our own actors)


def _refuse_silence(address: str) -> None:
    """Raises SettingsError where nobody listens at host:port: Ray would try for minutes."""
    if found := re.fullmatch(r"([^/:]+):(\d+)", address):
        try:
            socket.create_connection((found[1], int(found[2])), _ANSWER_S).close()
        except (OSError, OverflowError) as error:
            raise SettingsError(f"RAY_ADDRESS={address}: no cluster answers: {error}") from None


class _Place(NamedTuple):
    """Where an actor is: as the command was called, on whichever machine."""

    folder: str
    device: str
    threads: int | None


@dataclass(frozen=True, slots=True)
class _Work:
    """What an actor is made of. info: how the model has to run. inputs: those that the slices were
    cut from. ledger: what may be left out."""

    place: _Place
    recipe: Recipe
    info: RunnerInfo
    inputs: tuple[Input, ...]
    ledger: Ledger


def _how_it_runs(place: _Place, recipe: Recipe) -> RunnerInfo | Failure:
    try:
        os.chdir(place.folder)
        return recipe.encoder(place.device, place.threads).runner.info
    except Exception as error:
        return Failure.of(error)


class _Reopened(Sequence[Source]):
    """The inputs of the plan, each opened by its name when a slice needs it, and for as long as the
    actor lives. What patterns and folders stand for by now is not asked: it may be more."""

    def __init__(self, planned: Sequence[Input]) -> None:
        self._planned = planned
        self._sources: dict[int, Source] = {}
        self._ends = ExitStack()
        weakref.finalize(self, self._ends.close)

    def __len__(self) -> int:
        return len(self._planned)

    @overload
    def __getitem__(self, place: int) -> Source: ...
    @overload
    def __getitem__(self, place: slice) -> list[Source]: ...
    def __getitem__(self, place: int | slice) -> Source | list[Source]:
        """Raises ChangedError, FileError, SettingsError, OSError."""
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        if place not in self._sources:
            self._sources[place] = self._opened(self._planned[place])
        return self._sources[place]

    def _opened(self, one: Input) -> Source:
        if is_url(one.name):
            (source,) = self._ends.enter_context(opened([one.name]))
        else:
            status = os.stat(one.name)
            opener = partial(open_regular, Path(one.name))
            # Of the planned kind, which its content must not contradict.
            source = Source(one.name, one.kind, status.st_size, status, opener, is_sure=False)
            self._ends.callback(source.end)
        return one.reopened(source)


class _SliceWriter:
    """An actor: one model, which writes the slices that it is given. What fails is handed back, and
    raised where the command runs; Ray would repeat it, and says it in its own words."""

    def __init__(self, work: _Work) -> None:
        self._failure: Failure | None = None
        try:
            self._begin(work)
        except Exception as error:
            self._failure = Failure.of(error)

    def _begin(self, work: _Work) -> None:
        place, recipe = work.place, work.recipe
        os.chdir(place.folder)
        self._job = recipe.job
        encoder = recipe.encoder(place.device, place.threads)
        refuse_another(work.info, encoder.runner.info, f"{place.device} on {platform.node()}")
        self._writer = recipe.writer(encoder, work.ledger.run)
        self._rows = call.rows_of(recipe.arguments, recipe.job)
        self._sources = _Reopened(work.inputs)
        self._ledger = work.ledger

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[dict[str, list[bytes]]]:
        """A row for each shard: which rows were refused may be much, of a slice of short lines."""
        (raw,) = batch["slice"]
        for one in self._written(pickle.loads(raw)):  # noqa: S301
            yield {"found": [pickle.dumps(one)]}

    def _written(self, which: Slice) -> Iterator[Written | SliceEnd | Failure]:
        if self._failure is not None:
            yield self._failure
            return
        try:
            yield from self._writer.write_slice(
                which, self._sources, self._rows, self._job, self._ledger.has
            )
        except Exception as error:
            yield Failure.of(error)


def _taken(said: Any) -> Any:
    """What an actor says; what it failed with is raised."""
    if isinstance(said, Failure):
        raise said.error()
    return said
