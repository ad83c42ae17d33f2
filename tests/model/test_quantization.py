from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.attention.kernels import choose_kernel
from model.batch import Encoding
from model.config import ModelConfig
from model.encoder import Encoder
from model.errors import UnsupportedError
from model.linear import quantization
from model.packing import pack
from model.platform.products import choose
from model.weights.loader import empty_model, load_model
from tests.checkpoints import golden_cases
from tests.model.test_config import OFFICIAL
from tests.model.torches import VARLEN, needs_cpu_float8

CPU, META = torch.device("cpu"), torch.device("meta")


@cache
def exact_vectors(folder: Path) -> list[np.ndarray]:
    exact = Encoder(folder, device="cpu", dtype="float32")
    return [exact.encode(case["texts"], case["instruction"]) for case in golden_cases()[:4]]


@pytest.mark.whole
@pytest.mark.parametrize("how", ["int8", "int8-dynamic"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", ["golden", "wide"])
def test_8_bits_keep_the_direction(
    size: str, dtype: str, how: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(f"{size}_checkpoint")
    int8 = Encoder(folder, device="cpu", dtype=dtype, quantization=how, cpu_products="allow-slow")
    assert int8.runner.info.quantization.removesuffix(" (7-bit activations)") == how
    for case, exact in zip(golden_cases()[:4], exact_vectors(folder), strict=True):
        cosines = np.sum(exact * int8.encode(case["texts"], case["instruction"]), axis=1)
        assert cosines.min() >= 0.99, (case["name"], cosines)


@pytest.mark.parametrize("how", ["int8", "int8-dynamic"])
def test_int8_weights_are_int8(wide_checkpoint: Path, how: str) -> None:
    config = ModelConfig.from_dir(wide_checkpoint)
    layers = choose(CPU, torch.bfloat16, how, config.widest_product, "allow-slow")
    model = load_model(
        wide_checkpoint, config, device=CPU, dtype=torch.bfloat16, quantize=how, layers=layers
    )
    dtypes = {name: p.dtype for name, p in model.named_parameters() if "scales" not in name}
    linears = {n for n in dtypes if n.startswith("backbone.layers.") and "proj" in n}
    assert len(linears) == 4 * config.num_hidden_layers + 1  # the last layer's q stands apart
    assert {dtypes[name] for name in linears} == {torch.int8}
    assert {dtypes[name] for name in dtypes.keys() - linears} == {torch.bfloat16}


@pytest.mark.parametrize("how", ["int8", "int8-dynamic", "float8"])
def test_8_bits_are_a_quarter_of_the_official_model(how: str) -> None:
    """What is kept, counted on meta tensors: token table, pooler and norms stay in 16 bit."""
    config = ModelConfig.from_dict(OFFICIAL)
    model = empty_model(config, quantize=how, dtype=torch.bfloat16)
    kept = sum(p.numel() * p.element_size() for p in model.parameters())
    float32 = 4 * sum(p.numel() for p in empty_model(config).parameters())
    assert 0.25 < kept / float32 < 0.27, kept / float32


@pytest.mark.parametrize("how", ["int8", "int8-dynamic", "float8"])
@pytest.mark.parametrize("kernel", ["padded", VARLEN])
def test_the_cuda_branch_with_8_bits_on_meta_tensors(
    golden_config: ModelConfig, kernel: str, how: str
) -> None:
    model = empty_model(golden_config, quantize=how, dtype=torch.bfloat16)
    for module in filter(quantization.is_quantized, model.modules() if how == "int8" else ()):
        # How many columns are outliers depends on values, and meta tensors have none.
        module.state.threshold = 0.0
    _, attend = choose_kernel(kernel, META, torch.bfloat16)
    encodings = [Encoding(np.arange(n, dtype=np.int32), 3) for n in (9, 30)]
    with torch.inference_mode():
        vectors = model(pack(encodings, META), attend)
    assert (vectors.shape, vectors.dtype) == ((2, golden_config.hidden_size), torch.float32)


def test_unknown_quantization() -> None:
    with pytest.raises(UnsupportedError, match="known: none, int8"):
        quantization.check("int4", CPU, torch.float32)


def test_8_bits_where_they_cannot_run(wide_checkpoint: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"float8 needs a GPU .* this is bfloat16 on cpu"):
        Encoder(wide_checkpoint, device="cpu", dtype="bfloat16", quantization="float8")
    with pytest.raises(UnsupportedError, match="for CPUs"):
        quantization.check("int8-dynamic", torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("store", [torch.int8, torch.float8_e4m3fn])
def test_rows_are_quantized_by_their_own_largest_value(
    dtype: torch.dtype, store: torch.dtype
) -> None:
    x = torch.randn(100, 40, generator=torch.Generator().manual_seed(1)) * 10 ** torch.linspace(
        -2, 2, 100
    ).unsqueeze(1)
    x[7] = 0
    if store == torch.int8:
        values, scales = quantization.quantize_rows(x.to(dtype), 127)
    else:
        values, scales = quantization.float8_rows(x.to(dtype))
    assert (values.dtype, scales.shape) == (store, (100, 1))
    error = (values.float() * scales.float() - x).abs() / x.abs().amax(1, keepdim=True).clamp(1e-9)
    assert error.max() < (0.01 if store == torch.int8 else 0.05)
    assert not values[7].float().any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_dynamic_vectors_do_not_depend_on_the_batch(wide_checkpoint: Path, dtype: str) -> None:
    """LLM.int8 bends this promise; a scale for each row does not."""
    encoder = Encoder(
        wide_checkpoint,
        device="cpu",
        dtype=dtype,
        quantization="int8-dynamic",
        cpu_products="allow-slow",
    )
    texts = [" ".join(["word"] * n) for n in (1, 9, 40, 3)]
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    cosines = (encoder.encode(texts) * alone).sum(axis=1)
    assert cosines.min() >= (0.99999 if dtype == "float32" else 0.999), cosines


def test_weights_go_to_a_gpu_in_few_pieces() -> None:
    """Each piece costs a dozen launches and a wait, however small it is. Counted at 7B."""
    config = ModelConfig.from_dict(OFFICIAL)
    model = empty_model(config, quantize="float8", dtype=torch.bfloat16)
    layers = [m for m in model.modules() if isinstance(m, quantization.Float8Linear)]
    pieces = 0
    for layer in layers:
        weight = torch.empty(
            layer.out_features, layer.in_features, dtype=torch.float16, device=META
        )
        pieces += sum(1 for _ in quantization._chunks([weight], META))
    assert len(layers) == 129
    assert pieces <= 450


@needs_cpu_float8
@pytest.mark.parametrize("fast", [True, False, None], ids=["fast", "slow", "as it serves"])
@pytest.mark.parametrize("public", [True, False])
def test_a_float8_product_is_that_of_its_rows(
    monkeypatch: pytest.MonkeyPatch, fast: bool | None, public: bool
) -> None:
    """By torch's public name for it, and by the private one of older releases. It serves with fast
    accumulation."""
    if not public:
        monkeypatch.delattr(torch.nn.functional, "scaled_mm", raising=False)
    elif not hasattr(torch.nn.functional, "scaled_mm"):
        pytest.skip("this torch has none")
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 32, generator=generator), torch.randn(48, 32, generator=generator)
    layer = quantization.Float8Linear(32, 48)
    if fast is not None:
        layer.fast_accumulation = fast
    owner, name = (torch.nn.functional, "scaled_mm") if public else (torch, "_scaled_mm")
    product = getattr(owner, name)
    asked: list[bool] = []

    def spy(*args: Any, use_fast_accum: bool, **kwargs: Any) -> Tensor:
        asked.append(use_fast_accum)
        out: Tensor = product(*args, use_fast_accum=use_fast_accum, **kwargs)
        return out

    monkeypatch.setattr(owner, name, spy)
    for name, parameter in quantization.parameters_of(layer, [weight], 48, CPU):
        setattr(layer, name, parameter)
    assert layer.weight.stride() == (1, 32), "column by column, as cuBLAS wants it"
    got = layer(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert asked == [fast is not False]
    expected = x @ weight.T
    assert (got.float() - expected).norm() < 0.06 * expected.norm()
