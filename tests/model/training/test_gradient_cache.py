"""The cached gradient is the gradient, and its graphs are a part's."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.training import gradient_cache
from model.training.gradient_cache import split_by_tokens
from model.training.settings import TrainingSettings
from model.training.states import trained_parameters
from model.training.trainer import Trainer


@pytest.fixture
def settings(tiny_checkpoint: Path, tiny_data: Path) -> TrainingSettings:
    return TrainingSettings(
        model=str(tiny_checkpoint),
        data={str(tiny_data / "pairs.jsonl"): 1},
        texts=str(tiny_data / "texts.jsonl"),
        vectors=str(tiny_data / "vectors"),
        projection=str(tiny_data / "projection.safetensors"),
        texts_per_step=6,
        steps=4,
        pairs_per_step=16,
        max_negatives=2,
        dtype="float32",
        threads=1,
    )


def gradients(trainer: Trainer, backward: Callable[[], object]) -> dict[str, Tensor]:
    trainer.model.zero_grad(set_to_none=True)
    backward()
    found = {}
    for name, parameter in trained_parameters(trainer.model).items():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To 1e-5 of each parameter's largest gradient, or of 1 where that is less (float32: sums of
    other orders; 3.4e-6 seen)."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        atol = 1e-5 * max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=atol, msg=name)


def all_graphs_at_once(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The same parts, so that dropout draws the same numbers, but one graph over all."""

    def uncached(parts: Any, embed: Any, loss_of: Any) -> None:
        loss_of(torch.cat([embed(part) for part in parts])).backward()

    with monkeypatch.context() as patch:
        patch.setattr(gradient_cache, "backward", uncached)
        return gradients(trainer, lambda: trainer.backward(trainer.draw()))


@pytest.mark.parametrize("dropout", [None, 0.0, 0.3])
def test_the_gradients_are_those_of_one_graph(
    settings: TrainingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    lora = {} if dropout is None else {"lora_rank": 4, "lora_dropout": dropout}
    trainer = Trainer(replace(settings, tokens_per_pass=120, **lora), tmp_path)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:  # zero at first, and with it the gradient of A
                parameter.normal_(std=0.1)
    start = torch.get_rng_state()
    expected = all_graphs_at_once(trainer, monkeypatch)
    after = torch.get_rng_state()
    torch.set_rng_state(start)
    found = gradients(trainer, lambda: trainer.backward(trainer.draw()))
    assert torch.equal(torch.get_rng_state(), after)
    assert_same(found, expected)
    assert max(gradient.abs().max() for gradient in expected.values()) > 0.01
    if dropout:  # and the numbers matter: others give another gradient
        other = gradients(trainer, lambda: trainer.backward(trainer.draw()))
        assert max((other[name] - expected[name]).abs().max() for name in other) > 1e-4


def test_one_part_is_the_whole_step(settings: TrainingSettings, tmp_path: Path) -> None:
    whole = Trainer(settings, tmp_path)
    cached = Trainer(replace(settings, tokens_per_pass=120), tmp_path)
    expected = gradients(whole, lambda: whole.backward(whole.draw()))
    found = gradients(cached, lambda: cached.backward(cached.draw()))
    assert_same(found, expected)


class GraphMemory:
    """`with GraphMemory(model) as graph: …`, then `graph.peak`: the most bytes that autograd
    kept at a time for a backward pass, parameters not counted, each storage once."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._users: dict[int, int] = {}
        self._now = self.peak = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept.tensor)

    def _keep(self, tensor: Tensor) -> Any:
        class Kept:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor = tensor

        kept, storage = Kept(tensor), tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self._parameters:
            if not self._users.get(place):
                self._now += size
                self.peak = max(self.peak, self._now)
            self._users[place] = self._users.get(place, 0) + 1
            weakref.finalize(kept, self._free, place, size)
        return kept

    def _free(self, place: int, size: int) -> None:
        self._users[place] -= 1
        self._now -= 0 if self._users[place] else size

    def __enter__(self) -> GraphMemory:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)  # type: ignore[arg-type]
        assert self._now == 0, "some graph is still alive"


def test_the_graphs_in_memory_are_a_parts(settings: TrainingSettings, tmp_path: Path) -> None:
    trainer = Trainer(replace(settings, tokens_per_pass=120), tmp_path)
    encodings, _ = trainer._sorted(trainer.draw().prompted(trainer.family))
    parts = split_by_tokens([len(e) for e in encodings], 120)
    assert len(parts) >= 8
    largest = 0
    for part in parts:
        with GraphMemory(trainer.model) as alone:
            trainer._forward(encodings[part]).sum().backward()  # type: ignore[no-untyped-call]
        largest = max(largest, alone.peak)
    with GraphMemory(trainer.model) as cached:
        trainer.backward(trainer.draw())
    whole = Trainer(settings, tmp_path)
    with GraphMemory(whole.model) as uncached:
        whole.backward(whole.draw())
    assert cached.peak <= 1.02 * largest
    assert uncached.peak >= 0.6 * len(parts) * largest
    print(f"graph bytes: {uncached.peak} whole, {cached.peak} in {len(parts)} parts")


def test_parts_by_tokens() -> None:
    def parts(lengths: list[int], limit: int | None) -> list[list[int]]:
        return [lengths[part] for part in split_by_tokens(lengths, limit)]

    assert parts([9, 5, 4, 3, 2], 10) == [[9], [5, 4], [3, 2]]
    assert parts([30, 20, 2, 2], 10) == [[30], [20], [2, 2]]
    assert parts([5, 5], 10) == [[5, 5]]
    assert parts([5, 5, 5], None) == [[5, 5, 5]]
