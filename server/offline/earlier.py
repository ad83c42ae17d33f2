"""What an earlier run, or another part of this one, says in its manifest, and whether to go on.

Owns every refusal of a mix, with what differs. Knows nothing of rows or shards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from model.errors import UnsupportedError
from server.offline.job import Job
from server.offline.manifest import LAYOUT, Settled, differences, read_manifest, settled_by
from server.offline.parts import OutputError

_SETTLED = ("model.dtype", "model.products")
"""What `auto` finds by timing."""


class OtherSettledError(Exception):
    """A part that began at the same time has found other values for `auto`: take those."""


class Earlier:
    """The manifest that is there; None where none is, or where it binds nobody."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.manifest: dict[str, Any] | None = None

    def read(self, now: Mapping[str, Any], *, resume: bool, is_empty: bool) -> None:
        """is_empty: no row was kept. Raises OutputError when this run must not begin."""
        job = self._job
        taken = job.is_folder and any(
            entry != job.manifest and not entry.name.startswith(".")
            for entry in job.target.iterdir()
        )
        self.manifest = read_manifest(job.manifest)
        if not (self.is_complete or job.is_part) and is_empty:
            self.manifest = None  # a run that had done nothing yet binds nobody
        if self.manifest is not None and (resume or job.is_part):
            self.refuse_another(now)
            return
        if self.manifest is not None and not self.is_complete:
            raise OutputError(
                f"{job.manifest} is of an unfinished run: go on with --resume, or remove "
                f"{job.to_remove}"
            )
        if taken:
            hint = ", or --resume" if self.manifest is not None else ""
            raise OutputError(f"{job.target} is not empty: take another folder{hint}")
        self.manifest = None

    def take_another(self, now: Mapping[str, Any]) -> None:
        """Of a part that was quicker, by a moment. Raises OtherSettledError, OutputError."""
        self.manifest = read_manifest(self._job.manifest)
        changed = differences(now, self.manifest or {})
        if changed and all(one.startswith(_SETTLED) for one in changed):
            raise OtherSettledError
        self.refuse_another(now)

    @property
    def is_complete(self) -> bool:
        return bool(self.manifest and self.manifest.get("complete"))

    @property
    def settled(self) -> Settled:
        """What was chosen by timing when the earlier run began. To choose anew could mean other
        numbers, and their vectors have to go with those that are kept."""
        return settled_by(self.manifest or {})

    def refuse_settled(self, error: UnsupportedError) -> NoReturn:
        """Raises `error`, or OutputError where it is the earlier run that asks for too much."""
        if self.manifest is None:
            raise error
        raise OutputError(
            f"{self._job.manifest} cannot be gone on with here: {error}; use the machine that it "
            f"was begun on, or remove {self._job.to_remove} to begin anew"
        ) from None

    def refuse_another(self, now: Mapping[str, Any]) -> None:
        """Raises OutputError naming what differs, where there is a manifest."""
        if self.manifest is None:
            return
        if self.manifest.get("layout") != LAYOUT:
            raise OutputError(
                f"{self._job.manifest} is of an earlier version of this program, which cut shards "
                f"otherwise: finish it with that, or remove {self._job.to_remove} to begin anew"
            )
        if changed := differences(now, self.manifest):
            raise self.another(changed)

    def another(self, changed: Sequence[str]) -> OutputError:
        return OutputError(
            f"{self._job.manifest} was made with another {', '.join(changed)}: the vectors would "
            f"not belong together; give the same, or remove {self._job.to_remove} to begin anew"
        )
