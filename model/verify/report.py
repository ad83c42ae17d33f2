"""The report of `nv-embed gpu-check`: one JSON file, whole after each step.

Knows where a step's result goes, and nothing of what is measured. Torch-free.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCHEMA = "nv-embed-gpu-check/1"
SECTIONS = (
    *("machine", "software", "start", "parity", "forward", "products", "lone", "server"),
    *("profile", "faults", "fused"),
)


class Report:
    """`<card>-<date>.json` in a folder. Its status is "running" until `finish`."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """facts: what is known from the start (model, options)."""
        self._folder, self._begun = folder, time.time()
        self._data: dict[str, Any] = {
            "schema": SCHEMA,
            "status": "running",
            "begun": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._begun)),
            "seconds": 0.0,
            **facts,
            "steps": [],
            **{section: {} for section in SECTIONS},
        }
        self.path = self._named("gpu")

    def name_card(self, card: str) -> None:
        """From now on the file has this card's name, too."""
        old, self.path = self.path, self._named(card)
        if old.exists():
            old.rename(self.path)

    def _named(self, card: str) -> Path:
        plain = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") or "gpu"
        date = time.strftime("%Y-%m-%d-%H%M%S", time.gmtime(self._begun))
        return self._folder / f"{plain}-{date}.json"

    def add(
        self,
        name: str,
        status: str,
        seconds: float,
        result: Mapping[str, Any] | None,
        error: str | None,
    ) -> None:
        """What became of the step `name`, "section.part.part": its result goes to that place."""
        entry = {"name": name, "status": status, "seconds": round(seconds, 3)}
        self._data["steps"].append(entry | ({"error": error} if error else {}))
        if result:
            place = self._data
            for part in name.split("."):
                place = place.setdefault(part, {})
            place.update(result)
        self.write()

    def finish(self, status: str) -> None:
        self._data["status"] = status
        self.write()

    def write(self) -> None:
        """Whole or not at all: a run may be ended at any moment."""
        self._data["seconds"] = round(time.time() - self._begun, 1)
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            json.dump(self._data, file, indent=1, ensure_ascii=False, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)
