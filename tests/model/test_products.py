from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.batch import RunnerOptions
from model.encoder import Encoder
from model.errors import UnsupportedError
from model.linear.packed_linear import PackedLinear
from model.linear.quantization import PlainInt8Linear, ScaledLinear
from model.platform import products
from model.platform.products import Candidate, choose, fastest_dtype, probe
from model.runner import ModelRunner, wants_filler

CPU = torch.device("cpu")
SHAPE = (64, 96)


@pytest.fixture(autouse=True)
def probed_anew() -> Iterator[None]:
    products._probe.cache_clear()
    yield
    products._probe.cache_clear()


class Packed(PackedLinear):
    """A layout that is the weight itself."""

    compiles_rows = True
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return x @ self.weight.T

    @staticmethod
    def _laid_out(weight: Tensor) -> Tensor:
        return weight.clone()


class Fast(Packed):
    """Takes no time at all: it has the right answers by heart."""

    known: dict[tuple[int, int], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        key = (len(x), self.out_features)
        if key not in self.known:
            self.known[key] = x @ self.weight.T
        return self.known[key]


class Wrong(Fast):
    """Right with few rows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (0.01 if len(x) > 64 else 0)


class Slow(Packed):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.005)
        return super().forward(x)


class Missing(Packed):
    @staticmethod
    def _laid_out(weight: Tensor) -> Tensor:
        return torch.ops.mkl._an_operation_that_is_gone(weight)  # type: ignore[no-any-return]


class Refused(Packed):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("could not create a primitive\nand more")


@pytest.fixture
def candidates(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def set_them(*layers: type[nn.Module], kind: str = "float32") -> None:
        Fast.known, Wrong.known, Packed.calls, Slow.calls = {}, {}, 0, 0
        table = tuple(Candidate(layer.__name__, layer) for layer in layers)
        monkeypatch.setattr(
            products, "CANDIDATES", {**products.CANDIDATES, kind: (products._TORCH, *table)}
        )

    return set_them


def test_the_fastest_right_one_is_taken(candidates: Callable[..., None]) -> None:
    candidates(Wrong, Fast, Slow)
    found = probe("float32", "float32", *SHAPE)
    assert found.best.layer is Fast
    trouble = {trial.name: trial.trouble for trial in found.trials}
    assert trouble["Wrong"] == "wrong on this processor"
    assert trouble["Slow"].endswith("times the best")
    assert "float32 by Fast (ms with 16 and 256 rows:" in str(found)
    assert choose(CPU, torch.float32, "none", SHAPE).names == {"float32": "Fast"}


def test_a_slow_one_is_dropped_before_it_costs_much(candidates: Callable[..., None]) -> None:
    candidates(Slow)
    assert probe("float32", "float32", *SHAPE).best.name == "torch"
    assert Slow.calls <= 5  # the proof with few rows, and the smallest product
    (slow,) = [t for t in probe("float32", "float32", *SHAPE).trials if t.name == "Slow"]
    assert slow.seconds == ()


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (Missing, "cannot be had: '_OpNamespace' 'mkl' object has no attribute"),
        (Refused, "cannot be had: could not create a primitive"),
        (Wrong, "wrong on this processor"),
    ],
)
def test_plain_torch_stays(
    layer: type[PackedLinear], why: str, candidates: Callable[..., None]
) -> None:
    candidates(layer)
    found = probe("float32", "float32", *SHAPE)
    assert found.best.layer is nn.Linear
    assert str(found.trials[1]).startswith(f"{layer.__name__} ({why}")
    assert "\n" not in str(found)


def test_it_is_done_once_for_a_shape(candidates: Callable[..., None]) -> None:
    candidates(Packed)
    first = choose(CPU, torch.float32, "none", SHAPE)
    calls = Packed.calls
    assert calls
    assert choose(CPU, torch.float32, "none", SHAPE) == first
    assert Packed.calls == calls


def test_the_programs_defaults_and_random_numbers_are_left_alone() -> None:
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        before = probe("float32", "float32", *SHAPE)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(trial.trouble != "wrong on this processor" for trial in before.trials)
    assert torch.equal(torch.get_rng_state(), state)


# -- what follows from it --------------------------------------------------------------------


def paced(milliseconds: float) -> type[PackedLinear]:
    class Paced(Packed):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(milliseconds / 1000)
            return super().forward(x)

    return Paced


def only(monkeypatch: pytest.MonkeyPatch, **layers: type[nn.Module]) -> None:
    table = {kind: (Candidate(kind, layer),) for kind, layer in layers.items()}
    monkeypatch.setattr(products, "CANDIDATES", {**products.CANDIDATES, **table})


@pytest.mark.parametrize(
    ("float32", "bfloat16", "expected"),
    [(1.0, 10.0, torch.float32), (10.0, 1.0, torch.bfloat16), (7.0, 7.0, torch.float32)],
)
def test_auto_takes_bfloat16_where_it_is_clearly_faster(
    float32: float, bfloat16: float, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, float32=paced(float32), bfloat16=paced(bfloat16))
    assert fastest_dtype(SHAPE) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_that_is_slower_than_float32_is_refused(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SlowInt8(PlainInt8Linear):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.01)
            return super().forward(x)

    only(monkeypatch, float32=nn.Linear, int8=SlowInt8)
    refusal = (
        r"no faster than float32 on this processor \([\d.]+ in place of [\d.]+ ms with 16 rows, "
    )
    with pytest.raises(UnsupportedError, match=refusal + r".*--cpu-products allow-slow"):
        choose(CPU, dtype, "int8-dynamic", SHAPE)
    assert choose(CPU, dtype, "int8-dynamic", SHAPE, "allow-slow").eight_bit is SlowInt8
    monkeypatch.undo()
    products._probe.cache_clear()
    only(monkeypatch, float32=paced(10), int8=PlainInt8Linear)
    assert choose(CPU, dtype, "int8-dynamic", SHAPE).eight_bit is PlainInt8Linear


def test_plain_tries_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CANDIDATES", {})
    plain = choose(CPU, torch.float32, "int8-dynamic", SHAPE, "plain")
    assert (plain.linear, plain.eight_bit, plain.names) == (nn.Linear, PlainInt8Linear, {})
    for has in (True, False):
        monkeypatch.setattr(products.resources, "has_bfloat16", lambda has=has: has)
        assert (fastest_dtype(SHAPE, "plain") == torch.bfloat16) == has
    with pytest.raises(UnsupportedError, match="known: auto, plain, allow-slow"):
        choose(CPU, torch.float32, "none", SHAPE, "fast")


def test_what_was_taken_before_is_taken_again(candidates: Callable[..., None]) -> None:
    candidates(Wrong, Fast, Slow)
    assert choose(CPU, torch.float32, "none", SHAPE).linear is Fast
    for name, layer in (("torch", nn.Linear), ("Slow", Slow), ("Fast", Fast)):
        again = choose(CPU, torch.float32, "none", SHAPE, taken={"float32": name})
        assert (again.linear, again.names) == (layer, {"float32": name})
    for name, trouble in (
        ("Wrong", "float32 by Wrong, taken before: wrong on this processor"),
        ("gone", "float32 by gone, taken before: there is no such product"),
    ):
        with pytest.raises(UnsupportedError, match=trouble):
            choose(CPU, torch.float32, "none", SHAPE, taken={"float32": name})


def test_int8_that_was_taken_before_is_not_refused_for_its_speed(
    candidates: Callable[..., None],
) -> None:
    candidates(Fast)
    with pytest.raises(UnsupportedError, match="no faster than float32"):
        choose(CPU, torch.float32, "int8-dynamic", SHAPE)
    again = choose(CPU, torch.float32, "int8-dynamic", SHAPE, taken={"int8": "torch"})
    assert again.names == {"float32": "Fast", "int8": "torch"}


def test_filler_follows_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled for each number of rows is oneDNN's, in whichever type."""
    from model.attention.cpu import sdpa_by_length
    from model.attention.kernels import sdpa_padded

    class Level(Packed):
        compiles_rows = False

    for layer, compiles in ((Packed, True), (Level, False)):
        products._probe.cache_clear()
        only(monkeypatch, float32=layer)
        layers = choose(CPU, torch.float32, "none", SHAPE)
        assert layers.compiles_rows == compiles
        assert wants_filler(CPU, layers, sdpa_by_length) == compiles
        assert not wants_filler(CPU, layers, sdpa_padded)
        assert not wants_filler(torch.device("cuda"), layers, sdpa_by_length)


# -- the real candidates ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_what_is_chosen_here_is_right(kind: str, dtype: str) -> None:
    if kind != "int8" and kind != dtype:
        pytest.skip("activations have the product's own type")
    found = probe(kind, dtype, *SHAPE)
    assert not next(t for t in found.trials if t.name == found.best.name).trouble
    assert all(seconds > 0 for seconds in found.seconds)


def test_the_runner_says_what_it_took(
    golden_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "nv_embed.runner"):
        runner = ModelRunner(RunnerOptions(str(golden_checkpoint), dtype="float32", threads=1))
    assert set(runner.info.products) == {"float32"}
    taken = runner.info.products["float32"]
    assert f"products: float32 by {taken} (ms with 16 and 256 rows: torch " in caplog.text


def test_a_torch_without_its_private_operations(
    golden_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "ops", SimpleNamespace())
    with caplog.at_level(logging.INFO, "nv_embed.runner"):
        runner = ModelRunner(
            RunnerOptions(
                str(golden_checkpoint),
                dtype="float32",
                quantization="int8-dynamic",
                threads=1,
                cpu_products="allow-slow",
            )
        )
    assert runner.info.products == {"float32": "torch", "int8": "torch"}
    assert "onednn-s8 (cannot be had: " in caplog.text
    runner.warm_up()


MASKED = """
import json, sys
import numpy as np
from model.platform import resources
with resources.for_good():
    import torch
    from model.platform import products
    from model.encoder import Encoder
torch.set_num_threads(1)
with torch.inference_mode():
    found = products.probe("int8", "float32", 256, 1536)
    weight = torch.randint(-127, 128, (192, 256)).float()
    weight[:, 0] = 127  # so that every row's scale is 1
    weight[:8] = 127
    worst = 0.0
    for rows in (1, 16, 64, 300):
        most = 63 if found.best.name == "onednn-u7" else 127
        x = torch.randint(-most, most + 1, (rows, 256)).float()
        x[:, 0] = most
        x[0], x[rows // 2] = most, -most
        got = products.layer_of(found.best.layer, weight, torch.float32)(x).double()
        exact = x.double() @ weight.double().T
        worst = max(worst, float((got - exact).abs().max() / exact.abs().max()))
texts, exact = json.loads(sys.argv[1]), np.load(sys.argv[2])
int8 = Encoder(
    device="cpu", dtype="float32", threads=1, quantization="int8-dynamic",
    cpu_products="allow-slow",
)
cosines = (exact * int8.encode(texts)).sum(1)
info, cosine = int8.runner.info, float(cosines.min())
print(json.dumps([str(found), info.products["int8"], info.quantization, worst, cosine]))
"""
TEXTS = [
    "The committee met twice, in May and in June, and agreed on nothing.",
    "are judo throws allowed in wrestling?",
    "def fold(keys, queries): return keys @ queries / math.sqrt(len(queries))",
    "naïve café",
    "x",
    *(f"Paragraph {n} of the contract: delivery within {3 * n} days. " * n for n in range(1, 20)),
]


@pytest.fixture(scope="module")
def exact_vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the default model in float32, by the instructions that this processor has."""
    path = tmp_path_factory.mktemp("exact") / "vectors.npy"
    np.save(path, Encoder(device="cpu", dtype="float32", threads=1).encode(TEXTS))
    return path


@pytest.mark.process
@pytest.mark.parametrize("capability", ["default", "avx2"])
@pytest.mark.parametrize("isa", ["AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI", "DEFAULT"])
def test_int8_is_exact_under_every_instruction_set(
    isa: str, capability: str, exact_vectors: Path
) -> None:
    """As oneDNN works on lesser processors of this kind: the products of the integers, to the
    rounding of float32, and the vectors of the default model."""
    if capability == "avx2" and isa not in ("AVX2", "DEFAULT"):
        pytest.skip("torch's own kernels are masked together with the least and the best only")
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    if capability != "default":
        environment["ATEN_CPU_CAPABILITY"] = capability
    command = [sys.executable, "-c", MASKED, json.dumps(TEXTS), str(exact_vectors)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    found, name, quantization, worst, cosine = json.loads(done.stdout)
    print(found, worst, cosine)
    assert name in found
    assert ("7-bit" in quantization) == (name == "onednn-u7")
    assert worst < 1e-6, found
    assert cosine >= 0.998, found


@pytest.mark.parametrize("inputs", [8, 160, 5000])
@torch.inference_mode()
def test_the_plain_8_bit_product_is_exact(inputs: int) -> None:
    """Also with more outputs than it takes at a time."""
    weight = torch.randint(-127, 128, (100, inputs), generator=torch.Generator().manual_seed(0))
    weight[:, 0] = 127
    layer = products.layer_of(PlainInt8Linear, weight.float(), torch.float32)
    assert isinstance(layer, ScaledLinear)
    x = weight[:7].float()
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(layer(x).double(), expected, atol=0, rtol=1e-5)
