"""The fused kernels against their formulas in float64, and the whole model with them.

By Triton where it is: on a GPU, or without one by Triton's interpreter, which shows that loops,
masks and strides are right. How it rounds is not a GPU's: it cuts bfloat16 off and loses the carry
in float8. So it gets float32 in place of both, and torch rounds. CPU builds of torch come without
Triton: `make test-triton` installs the one that belongs to the lock's torch.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model import fused
from model.attention.cpu import sdpa_by_length
from model.batch import Encoding, RunnerOptions
from model.config import ModelConfig, Rope
from model.errors import UnsupportedError
from model.fused import Fused
from model.linear.quantization import Float8Linear, ScaledRows, float8_rows
from model.packing import pack
from model.platform.products import Products
from model.rotary import HalvesRotary
from model.runner import ModelRunner
from model.weights.loader import load_model
from tests.model import fused_stand_in as stand_in
from tests.model.torches import needs_cpu_float8

ON_GPU = torch.cuda.is_available()
CPU = torch.device("cpu")
EPS = 1e-5
ROWS_AND_WIDTHS = [(1, 64), (1, 1), (3, 12), (5, 300), (7, 513), (2, 2048)]
DTYPES = [torch.float32, torch.bfloat16]
HALF_A_STEP = 1 / 16  # of float8, relative
pytestmark = [  # of numpy, by the interpreter
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in divide"),
]


def interpreted(kernel: str, programs: int, *args: Any, **constants: Any) -> None:
    """Triton's launch with float32 in place of each tensor: the same sizes, strides and offsets, in
    memory as large, whose numbers go back all together."""
    from model import triton_kernels

    wholes = {
        id(x): x.new_empty(0).set_(
            x.untyped_storage(), 0, (x.untyped_storage().nbytes() // x.itemsize,)
        )
        for x in args
        if isinstance(x, Tensor)
    }
    wide = {key: whole.float() for key, whole in wholes.items()}
    triton_kernels.launch(
        kernel,
        programs,
        *(
            wide[id(x)].as_strided(x.shape, x.stride(), x.storage_offset())
            if isinstance(x, Tensor)
            else x
            for x in args
        ),
        **constants,
    )
    for key, whole in wholes.items():
        whole.copy_(wide[key])


@pytest.fixture(params=["stand-in", "triton"])
def kernels(request: pytest.FixtureRequest) -> Fused:
    if request.param == "stand-in":
        return Fused(stand_in.launch)
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: see this file's docstring")
    if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("neither a GPU nor TRITON_INTERPRET=1")
    if not ON_GPU:
        return Fused(interpreted)
    from model import triton_kernels

    return Fused(triton_kernels.launch)


@pytest.fixture
def device(kernels: Fused) -> torch.device:
    return CPU if kernels.launch is stand_in.launch or not ON_GPU else torch.device("cuda")


def numbers(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    sizes = torch.logspace(-2, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return (x * sizes).to(device=device, dtype=dtype)


def apart(x: Tensor) -> Tensor:
    """The same rows, each with other numbers (NaN) behind it."""
    wider = torch.cat((x, torch.full_like(x[:, :1], torch.nan).expand(-1, 5)), dim=1)
    return wider[:, : x.shape[1]]


def assert_rows(rows: Tensor | ScaledRows, expected: Tensor) -> None:
    """Float8 rows and scales that stand for `expected` (float64) as nearly as float8 can."""
    assert isinstance(rows, ScaledRows)
    values, scales = rows
    assert values.dtype == torch.float8_e4m3fn
    assert values.is_contiguous()
    assert scales.dtype == torch.float32
    assert scales.shape == (len(expected), 1)
    torch.testing.assert_close(
        scales.double(), expected.abs().amax(1, keepdim=True) / 448, rtol=1e-4, atol=1e-37
    )
    error = (values.double() * scales.double() - expected).abs()
    smallest = scales.double() * 2**-9  # float8's step near zero
    assert (error <= HALF_A_STEP * 1.001 * expected.abs() + smallest).all(), error.max()


def near(dtype: torch.dtype) -> dict[str, float]:
    """Half a step of the result's dtype, and what float32 loses on the way."""
    return {"rtol": 2e-5 if dtype == torch.float32 else 2**-8, "atol": 1e-6}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ROWS_AND_WIDTHS)
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("float8", [True, False])
def test_add_and_norm(
    kernels: Fused, device: torch.device, size: tuple[int, int],
    dtype: torch.dtype, add: bool, float8: bool,
) -> None:  # fmt: skip
    residual = apart(numbers(*size, dtype=dtype, device=device))
    update = apart(numbers(*size, dtype=dtype, device=device, seed=1)) if add else None
    weight = numbers(1, size[1], dtype=dtype, device=device, seed=2)[0] + 1
    summed = residual.float() if update is None else residual.float() + update.float()
    added = summed.to(dtype)
    wide = (summed if kernels.launch is interpreted else added).double()  # float32 throughout
    rms = (wide.pow(2).mean(1, keepdim=True) + EPS).sqrt()
    if update is None:
        got = kernels.norm(residual, weight, EPS, float8=float8)
    else:
        _, got = kernels.add_norm(residual, update, weight, EPS, float8=float8)
    assert torch.equal(residual, added), "the sum is left in the residual's place"
    if float8:
        assert_rows(got, wide / rms * weight.double())
    else:
        assert isinstance(got, Tensor)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wide / rms * weight.double(), **near(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ROWS_AND_WIDTHS)
@pytest.mark.parametrize("float8", [True, False])
def test_silu_times_up(
    kernels: Fused, device: torch.device, size: tuple[int, int],
    dtype: torch.dtype, float8: bool,
) -> None:  # fmt: skip
    rows, width = size
    gate_up = apart(numbers(rows, 2 * width, dtype=dtype, device=device))
    gate_up[0, 0] = -200  # exp(200) is infinite in float32
    gate, up = gate_up.double().chunk(2, dim=1)
    expected = gate * torch.sigmoid(gate) * up
    got = kernels.silu_up(gate_up, float8=float8)
    if float8:
        assert_rows(got, expected)
    else:
        assert isinstance(got, Tensor)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, **near(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ROWS_AND_WIDTHS)
def test_to_float8(
    kernels: Fused, device: torch.device, size: tuple[int, int], dtype: torch.dtype
) -> None:
    x = apart(numbers(*size, dtype=dtype, device=device))
    assert_rows(kernels.to_float8(x), x.double())


def test_rows_of_zeros_and_of_nan(kernels: Fused, device: torch.device) -> None:
    """Zeros stay zeros, and what is not finite does not become a number."""
    x = torch.ones(4, 40, dtype=torch.bfloat16, device=device)
    x[0] = 0
    x[1, 3], x[2, 3] = torch.nan, torch.inf
    values, scales = kernels.to_float8(x)
    assert torch.isfinite(scales[[0, 3]]).all()
    assert (scales[[0, 3]] > 0).all()
    assert not values[0].float().any()
    assert values[3].float().eq(448).all()
    back = values.float() * scales
    assert back[1:3].isnan().any(dim=1).all(), back


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "heads", "width"), [(1, 1, 2), (3, 5, 12), (4, 10, 64)])
def test_rotary_on_heads_of_a_wider_product(
    kernels: Fused, device: torch.device, rows: int, heads: int, width: int, dtype: torch.dtype
) -> None:
    """Each second one, so that neither rows nor heads follow one another."""
    product = numbers(rows, 2 * heads + 1, width, dtype=dtype, device=device)
    before = product.clone()
    positions = torch.arange(rows, dtype=torch.int32, device=device) * 37 + 1
    rotary = kernels.rotary.of(positions, Rope(width, 10000.0), dtype)
    x = product[:, 1::2]
    first, second = x.double().chunk(2, dim=-1)
    cos, sin = rotary.cos.double(), rotary.sin.double()
    expected = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    assert isinstance(rotary, HalvesRotary)
    assert rotary.rotate(x) is x
    torch.testing.assert_close(x.double(), expected, **near(dtype) | {"atol": 2e-5})
    assert torch.equal(product[:, ::2], before[:, ::2]), "heads between those turned"


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_float8_rows(dtype: torch.dtype) -> None:
    """In bfloat16 the scale and the quotient are rounded to it on the way."""
    x = numbers(100, 48, dtype=dtype, device=CPU)
    values, scales = float8_rows(x)
    assert values.dtype == torch.float8_e4m3fn
    assert scales.dtype == torch.float32
    error = (values.double() * scales.double() - x.double()).abs()
    rounding = HALF_A_STEP + (0 if dtype == torch.float32 else 2**-8)
    assert (error <= rounding * x.double().abs() + scales.double() * 2**-9).all()


def vectors(folder: Path, quantize: str, kernels: Fused | None) -> Tensor:
    config = ModelConfig.from_dir(folder)
    eight_bit = Float8Linear if quantize == "float8" else None
    layers = Products(torch.bfloat16, nn.Linear, eight_bit)
    model = load_model(
        folder,
        config,
        device=CPU,
        dtype=torch.bfloat16,
        quantize=quantize,
        layers=layers,
        operations=kernels,
    )
    generator = np.random.default_rng(0)
    encodings = [
        Encoding(generator.integers(3, config.vocab_size, n).astype(np.int32), start)
        for n, start in ((9, 3), (1, 0), (40, 0), (17, 16))
    ]
    with torch.inference_mode():
        return model(pack(encodings, CPU), sdpa_by_length)  # type: ignore[no-any-return]


@pytest.mark.whole
@pytest.mark.parametrize("quantize", ["none", pytest.param("float8", marks=needs_cpu_float8)])
def test_the_whole_model_is_the_same_with_them(
    wide_checkpoint: Path, kernels: Fused, quantize: str
) -> None:
    if kernels.launch is not stand_in.launch and ON_GPU:
        pytest.skip("on a GPU gpu-check compares")
    exact = vectors(wide_checkpoint, "none", None)
    cosines = (vectors(wide_checkpoint, quantize, kernels) * exact).sum(1)
    if quantize == "none":
        assert cosines.min() > 0.999, cosines
    else:  # as near as without them
        plain = (vectors(wide_checkpoint, quantize, None) * exact).sum(1)
        assert plain.min() > 0.97, plain
        assert (cosines > plain - 0.01).all(), (cosines, plain)


@needs_cpu_float8
def test_float8_rows_reach_the_products_once(wide_checkpoint: Path) -> None:
    """With the kernels no float8 layer quantizes by itself but the one behind attention."""
    names: list[str] = []

    def launch(kernel: str, programs: int, *args: object, **constants: object) -> None:
        names.append(kernel + (" to float8" if constants.get("float8") else ""))
        stand_in.launch(kernel, programs, *args, **constants)

    layers = ModelConfig.from_dir(wide_checkpoint).num_hidden_layers
    vectors(wide_checkpoint, "float8", Fused(launch))
    counts = {name: names.count(name) for name in set(names)}
    assert counts == {
        "add_norm to float8": 2 * layers,
        "add_norm": 1,  # the last, which feeds the pooler
        "silu_up to float8": layers,
        "to_float8": layers,
        "rotate": layers + 1,  # the last layer's q and k lie apart
    }


def test_a_runner_without_a_gpu_refuses_them(wide_checkpoint: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"'triton' cannot be used on cpu.*CUDA only"):
        ModelRunner(RunnerOptions(str(wide_checkpoint), fused_kernels="triton"))


def test_where_they_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused.choose("plain", CPU) is None
    with pytest.raises(UnsupportedError, match="known: plain, triton"):
        fused.choose("cuda", CPU)
    with pytest.raises(UnsupportedError, match="runs on CUDA only"):
        fused.choose("triton", CPU)
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="not installed"):
        fused.choose("triton", gpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UnsupportedError, match=r"8\.0 \(Ampere\)"):
        fused.choose("triton", gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UnsupportedError, match="C compiler"):
        fused.choose("triton", gpu)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from model import triton_kernels as kernels

def compiles(name, capability, eight, warps, **constants):
    kernel = getattr(kernels, name)
    integers = {"width", "half", "heads"}
    signature = {
        arg: "constexpr" if arg in constants
        else "fp32" if arg == "eps"
        else "i32" if arg in integers or arg.endswith("stride")
        else "*fp8e4nv" if arg == "values" and eight
        else "*fp32" if arg == "scales" and eight
        else "*bf16"
        for arg in kernel.arg_names
    }
    places = {(kernel.arg_names.index(arg),): value for arg, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    target = GPUTarget("cuda", capability, 32)
    assert triton.compile(source, target=target, options={"num_warps": warps}).asm["cubin"]

for capability in (80, 86, 89, 90, 100, 120):
    for float8 in (False, True)[: 2 if capability >= 89 else 1]:
        for add in (False, True):
            compiles("add_norm", capability, float8, 8, add=add, float8=float8, block=4096)
        compiles("silu_up", capability, float8, 16, float8=float8, block=16384)
    if capability >= 89:
        compiles("to_float8", capability, True, 8, block=4096)
    compiles("rotate", capability, False, 8, head_block=64, block=64)
print("all")
"""


@pytest.mark.process
def test_they_compile_for_every_gpu(tmp_path: Path) -> None:
    """At the official sizes, to machine code, which takes no GPU. In a process without the
    interpreter, whose kernels are none to compile."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: see this file's docstring")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "all\n", done.stderr
