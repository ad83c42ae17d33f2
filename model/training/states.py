"""A run's folder: whose it is, the states that it goes on from, its metrics.

A state holds what is trained, the optimizer's moments, the random generators and the number of
the step, as safetensors and JSON, no pickle. With the settings and the files that they name it is
all that a run needs to go on to the same weights, bit for bit. Knows nothing of losses or batches.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.training.gradient_cache import rng_state, set_rng_state
from model.training.settings import TrainingSettings, TrainingSettingsError
from model.user_files import locked
from model.weights.headers import weight_files

logger = logging.getLogger("nv_embed.training")
_KEPT_STATES = 2


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters, or with LoRA the adapters and the pooler."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class RunFolder:
    """settings.json, inputs.json, metrics.jsonl and `state/step-…` of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._states = path / "state"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs away. Raises LockedError when one is there already."""
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path / ".lock", self.path):
            yield

    def claim(self, settings: TrainingSettings) -> None:
        """Make the folder this run's. Raises TrainingSettingsError when it holds a run of other
        settings, or of the same ones whose files have changed since, or a file that is read."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._refuse_inputs(settings)
        for part in self._states.glob(".part-*"):  # of a run that was killed
            shutil.rmtree(part)
        mine = json.loads(json.dumps(settings.to_json()))
        found = self._read_or_write("settings.json", mine)
        found = {**settings.defaults(), **found}  # of before a setting existed: its default
        if differing := [key for key in mine if key != "threads" and found[key] != mine[key]]:
            shown = "; ".join(f"{k}: {found[k]!r} there, {mine[k]!r} now" for k in differing)
            raise TrainingSettingsError(
                f"{self.path} holds a run of other settings ({shown}); set them back, or choose "
                "another folder"
            )
        if found["threads"] != mine["threads"]:
            logger.warning(
                "this run began with threads = %s and goes on with %s: its weights will differ "
                "in their last digits from an uninterrupted run's",
                found["threads"],
                mine["threads"],
            )
        digests = {str(file): _digest(file) for file in input_files(settings)}
        before = self._read_or_write("inputs.json", digests)
        if changed := sorted(
            name for name in digests | before if digests.get(name) != before.get(name)
        ):
            raise TrainingSettingsError(
                f"{self.path} began with other contents of {', '.join(changed)}; put them back, "
                "or choose another folder"
            )

    def _refuse_inputs(self, settings: TrainingSettings) -> None:
        """Raises TrainingSettingsError for an input that this run would write over or remove."""
        written = [self.path / "metrics.jsonl"]
        for folder in (self.path / "checkpoint", self._states):
            written += folder.rglob("*")
        ours = {(s.st_dev, s.st_ino) for s in (path.stat() for path in written if path.is_file())}
        for path in input_files(settings):
            found = path.stat()
            if (found.st_dev, found.st_ino) in ours:
                raise TrainingSettingsError(
                    f"{path} is read, and a run in {self.path} writes over it: choose another "
                    "folder"
                )

    def _read_or_write(self, name: str, value: dict[str, Any]) -> dict[str, Any]:
        path = self.path / name
        if not path.exists():
            part = path.with_suffix(".part")
            part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
            part.replace(path)
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
        """Write the state of this step, then forget all but the last ones."""
        target = self._states / f"step-{step:07}"
        part = self._states / f".part-{os.getpid()}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        trained = trained_parameters(model)
        weights = {name: parameter.detach() for name, parameter in trained.items()}
        save_file(weights, str(part / "model.safetensors"))
        moments: dict[str, Tensor] = {
            f"{name}.{key}": value
            for name, parameter in trained.items()
            for key, value in optimizer.state[parameter].items()
        }
        save_file(moments | rng_state(), str(part / "optimizer.safetensors"))
        (part / "state.json").write_text(json.dumps({"step": step}) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        for old in sorted(self._states.glob("step-*"))[:-_KEPT_STATES]:
            shutil.rmtree(old)
        return target

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Take over the last state, if there is one; the number of steps done."""
        states = sorted(self._states.glob("step-*"))
        if not states:
            (self.path / "metrics.jsonl").unlink(missing_ok=True)
            return 0
        weights = load_file(str(states[-1] / "model.safetensors"))
        moments = load_file(str(states[-1] / "optimizer.safetensors"))
        trained = trained_parameters(model)
        assert trained.keys() == weights.keys(), trained.keys() ^ weights.keys()
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(weights[name])
        for moment, value in moments.items():
            name, _, key = moment.rpartition(".")
            if name:  # no random generator's state
                parameter = trained[name]
                # fused Adam: `step`, too, on its device
                optimizer.state[parameter][key] = value.to(parameter.device)
        set_rng_state(moments)
        step = int(json.loads((states[-1] / "state.json").read_text())["step"])
        self._forget_metrics_after(step)
        logger.info("going on from step %d", step)
        return step

    def _forget_metrics_after(self, step: int) -> None:
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        # A killed run may leave half a line behind.
        whole = [line for line in lines if line.endswith("}")]
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in kept))

    def log(self, metrics: dict[str, Any]) -> None:
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")


def input_files(settings: TrainingSettings) -> list[Path]:
    """Every file that decides what a run computes: the start, the examples, the teacher's."""
    start = Path(settings.model)
    files = [
        start / "config.json",
        start / "tokenizer.json",
        *(f.path for f in weight_files(start)),
    ]
    files += [Path(name) for name in settings.data]
    files += [Path(name) for name in (settings.scored, settings.texts, settings.projection) if name]
    if settings.vectors:
        files += sorted(Path(settings.vectors).glob("[0-9]*.npy"))
    if settings.words:
        files += sorted(Path(settings.words).glob("[0-9]*"))
    return files


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
