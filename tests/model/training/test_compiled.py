"""Compiled passes compute what the others do, forwards and backwards."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.training import compiled
from model.training.network import load_trained
from model.training.trainer import Trainer
from tests.layers import ROOT
from tests.model.training.test_trainer import settings_of

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler"),
    pytest.mark.slow,
]


def test_the_gradients_are_the_same(tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path) -> None:
    """In a fresh process: torch's compiler wants to be the first there to import setuptools."""
    program = f"from {__name__} import compare; import sys; compare(*sys.argv[1:])"
    arguments = [str(path) for path in (tiny_checkpoint, tiny_data, tmp_path)]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, cwd=ROOT)


def test_what_was_compiled_for_other_vector_units_is_not_taken(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """One cache on disk, as of one machine under two settings or of two machines on one disk."""
    program = f"from {__name__} import compare_one_pass; import sys; compare_one_pass(sys.argv[1])"
    for mask in ({}, {"ATEN_CPU_CAPABILITY": "default"}):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), **mask}
        command = [sys.executable, "-c", program, str(tiny_checkpoint)]
        subprocess.run(command, check=True, cwd=ROOT, env=environment)


def compare_one_pass(checkpoint: str) -> None:
    compiled.compile_parts(load_trained(Path(checkpoint), device=torch.device("cpu")))
    x = torch.linspace(-9, 9, 5 * 64).reshape(5, 64).requires_grad_()
    values = [f(x) for f in (compiled._activated, compiled._compiled(compiled._activated))]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), x)[0] for v in values))


def compare(checkpoint: str, data: str, out: str) -> None:
    plain = settings_of(Path(checkpoint), Path(data))
    gradients, vectors = [], []
    for run, compile_it in (("plain", False), ("compiled", True)):
        trainer = Trainer(dataclasses.replace(plain, compile=compile_it), Path(out) / run)
        if compile_it:
            assert trainer.model.backbone.rotary.__name__ == "CompiledRotary"
        for step in range(2):  # two shapes
            trainer.step = step
            trainer.backward(trainer.draw())
        gradients.append({n: p.grad for n, p in trainer.model.named_parameters()})
        vectors.append(torch.from_numpy(trainer.embed_texts(["red cat", "tea"], "query")))
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        got = gradients[1][name]
        torch.testing.assert_close(got, expected, msg=f"{name}: {{}}".format, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*vectors)
