from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from model import quantization
from model.attention import choose_kernel
from model.batch import Encoding
from model.config import NVEmbedConfig
from model.encoder import Encoder
from model.errors import UnsupportedError
from model.loader import empty_model, load_model
from model.packing import pack
from tests.checkpoints import golden_cases

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", ["golden", "wide"])
def test_int8_keeps_the_direction(size: str, dtype: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(f"{size}_checkpoint")
    exact = Encoder(folder, device="cpu", dtype="float32")
    int8 = Encoder(folder, device="cpu", dtype=dtype, quantization="int8")
    assert int8.runner.info.quantization == "int8"
    for case in golden_cases()[:4]:
        cosines = np.sum(
            exact.encode(case["texts"], case["instruction"])
            * int8.encode(case["texts"], case["instruction"]),
            axis=1,
        )
        assert cosines.min() >= 0.99, (case["name"], cosines)


def test_int8_weights_are_int8(wide_checkpoint: Path) -> None:
    config = NVEmbedConfig.from_dir(wide_checkpoint)
    model = load_model(wide_checkpoint, config, device=CPU, dtype=torch.bfloat16, quantize="int8")
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    linears = {n for n in dtypes if n.startswith("backbone.layers.") and "proj" in n}
    assert len(linears) == 4 * config.num_hidden_layers + 1  # the last layer's q stands apart
    assert {dtypes[name] for name in linears} == {torch.int8}
    assert {dtypes[name] for name in dtypes.keys() - linears} == {torch.bfloat16}


@pytest.mark.parametrize("kernel", ["varlen", "padded"])
def test_the_cuda_branch_with_int8_on_meta_tensors(
    golden_config: NVEmbedConfig, kernel: str
) -> None:
    model = empty_model(golden_config, quantize="int8", dtype=torch.bfloat16)
    for module in filter(quantization.is_quantized, model.modules()):
        # How many columns are outliers depends on values, and meta tensors have none.
        module.state.threshold = 0.0
    _, attend = choose_kernel(kernel, META, torch.bfloat16)
    encodings = [Encoding(np.arange(n, dtype=np.int32), 3) for n in (9, 30)]
    with torch.inference_mode():
        vectors = model(pack(encodings, META), attend)
    assert (vectors.shape, vectors.dtype) == ((2, golden_config.hidden_size), torch.float32)


def test_unknown_quantization() -> None:
    with pytest.raises(UnsupportedError, match="known: none, int8"):
        quantization.check("int4")
