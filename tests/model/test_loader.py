from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import ModelConfig
from model.errors import CheckpointError
from model.platform import products
from model.platform.products import Products
from model.rotary import as_neighbours
from model.verify.parts import load_backbone
from model.weights.checkpoint import Checkpoint
from model.weights.loader import load_model
from model.weights.names import expected_shapes
from tests.checkpoints import config_json, recipe_tensor

INDEX = "model.safetensors.index.json"
K_PROJ = "embedding_model.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def folder(tmp_path: Path, golden_checkpoint: Path) -> Path:
    """A copy of the golden checkpoint to break."""
    return Path(shutil.copytree(golden_checkpoint, tmp_path / "copy"))


def load(folder: Path) -> None:
    config = ModelConfig.from_dir(folder)
    load_model(folder, config, device=torch.device("cpu"), dtype=torch.float32)


def edit(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Change the tensors of the shard that holds K_PROJ."""
    index = json.loads((folder / INDEX).read_text())
    shard = folder / index["weight_map"][K_PROJ]
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard)


def test_missing_and_surplus_tensors_are_named(folder: Path) -> None:
    def rename(tensors: dict[str, np.ndarray]) -> None:
        tensors["k_proj.lora_A"] = tensors.pop(K_PROJ)

    edit(folder, rename)
    with pytest.raises(CheckpointError) as error:
        load(folder)
    assert f"missing: {K_PROJ}" in str(error.value)
    assert "surplus: k_proj.lora_A" in str(error.value)


def test_a_wrong_shape_is_named(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({K_PROJ: tensors[K_PROJ][:16].copy()}))
    with pytest.raises(CheckpointError, match="k_proj") as error:
        load(folder)
    assert "[16, 64]" in str(error.value) or "(16, 64)" in str(error.value)
    assert "[32, 64]" in str(error.value) or "(32, 64)" in str(error.value)


def test_an_incomplete_download(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00002\.safetensors"):
        load(folder)


def test_a_truncated_shard(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors cannot be read"):
        load(folder)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_that_points_outside(folder: Path, name: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {K_PROJ: name}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        load(folder)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}']
)
def test_a_malformed_index(folder: Path, content: str) -> None:
    (folder / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read|lacks 1"):
        load(folder)


def test_no_weights_or_pickles_only(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(CheckpointError, match="other weight formats are not read"):
        load(folder)


def test_a_single_file_gives_the_same_parameters(folder: Path, golden_checkpoint: Path) -> None:
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / INDEX).unlink()
    save_file(tensors, folder / "model.safetensors")
    config = ModelConfig.from_dir(folder)
    options = {
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "layers": Products(torch.float32, nn.Linear),  # opaque weights do not compare
    }
    single = load_model(folder, config, **options).state_dict()
    sharded = load_model(golden_checkpoint, config, **options).state_dict()
    assert single.keys() == sharded.keys()
    assert all(torch.equal(single[name], sharded[name]) for name in single)


def test_every_parameter_is_loaded(golden_checkpoint: Path, golden_config: ModelConfig) -> None:
    model = load_model(
        golden_checkpoint, golden_config, device=torch.device("cpu"), dtype=torch.bfloat16
    )
    for name, parameter in model.named_parameters():
        assert (parameter.device.type, parameter.dtype) == ("cpu", torch.bfloat16), name
        assert not parameter.requires_grad


def test_the_fused_projections_keep_their_order(
    golden_checkpoint: Path, golden_config: ModelConfig
) -> None:
    model = load_model(
        golden_checkpoint, golden_config, device=torch.device("cpu"), dtype=torch.float32
    )
    fused = model.backbone.layers[0].self_attn.qkv_proj
    with torch.inference_mode():
        rows = fused(torch.eye(golden_config.hidden_size)).T.numpy()  # whatever the layer keeps
    shapes = expected_shapes(golden_config)
    names = [f"embedding_model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
    q, k, v = (torch.from_numpy(recipe_tensor(name, shapes[name])).float() for name in names)
    q, k = (as_neighbours(part, golden_config.head_dim) for part in (q, k))
    np.testing.assert_array_equal(rows, np.concatenate([q, k, v]))


def test_a_tensor_that_cannot_be_read_ends_the_loading(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of many that are read at the same time: its error is told, the others are given up."""
    read = Checkpoint.rows

    def rows(self: Checkpoint, name: str, *where: int) -> torch.Tensor:
        if name == K_PROJ:
            raise CheckpointError(f"{name} cannot be read")
        return read(self, name, *where)

    monkeypatch.setattr(Checkpoint, "rows", rows)
    with pytest.raises(CheckpointError, match=r"k_proj\.weight cannot be read"):
        load(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name",
    [
        "embedding_model.embed_tokens.weight",  # a row that no warm-up would meet
        K_PROJ,
        "embedding_model.norm.weight",
        "latent_attention_model.latents",
        "latent_attention_model.cross_attend_blocks.0.fn.to_out.weight",
    ],
)
def test_a_single_number_that_is_none_is_refused(folder: Path, name: str, value: float) -> None:
    shard = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(shard)
    tensors[name][-1] = value
    save_file(tensors, shard)
    with pytest.raises(CheckpointError, match=rf"{name} holds NaN or infinity"):
        load(folder)


@pytest.mark.parametrize("quantize", ["none", "int8-dynamic"])
def test_infinity_is_found_before_it_is_quantized(folder: Path, quantize: str) -> None:
    edit(folder, lambda tensors: tensors[K_PROJ].__setitem__((3, 5), np.inf))
    config, device = ModelConfig.from_dir(folder), torch.device("cpu")
    shape = config.widest_product
    layers = products.choose(device, torch.float32, quantize, shape, "allow-slow")
    with pytest.raises(CheckpointError, match=r"k_proj\.weight holds NaN or infinity"):
        load_model(
            folder, config, device=device, dtype=torch.float32, quantize=quantize, layers=layers
        )


@pytest.mark.parametrize("dtype", [np.int16, np.float64])
def test_other_numbers_than_weights_are_refused(folder: Path, dtype: type) -> None:
    edit(folder, lambda tensors: tensors.update({K_PROJ: tensors[K_PROJ].astype(dtype)}))
    with pytest.raises(CheckpointError, match=r"k_proj\.weight' is '[IF][0-9]+'"):
        load(folder)


def test_float32_weights_are_read_as_they_are(folder: Path) -> None:
    before = Checkpoint(folder).rows(K_PROJ)
    edit(folder, lambda tensors: tensors.update({K_PROJ: tensors[K_PROJ].astype(np.float32)}))
    assert torch.equal(Checkpoint(folder).rows(K_PROJ), before.float())


# -- memory ----------------------------------------------------------------------------------

MEASURE = """
import sys
from pathlib import Path
from model.platform import resources
with resources.for_good():
    import torch
    from model.linear import quantization
    from model.platform import products
    from model.config import ModelConfig
    from model.weights.loader import empty_model, load_model
folder, dtype, quantize = Path(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
if quantize == "int8":
    quantization.quantize([torch.zeros(8, 8)], 8, torch.device("cpu"))  # bitsandbytes' own memory
config = ModelConfig.from_dir(folder)
# The weights as they are kept. (It also has torch import what the first meta tensor needs.)
empty = empty_model(config, quantize=quantize, dtype=dtype)
kept = sum(p.numel() * p.element_size() for p in empty.parameters())
device = torch.device("cpu")
layers = products.choose(  # first: it takes memory of the libraries' own
    device, dtype, quantize, config.widest_product, "allow-slow"
)
before = resources.anonymous_memory()
with resources.PeakMemory() as peak:
    model = load_model(
        folder, config, device=device, dtype=dtype, quantize=quantize, layers=layers
    )
print((peak.bytes - before) / kept, kept)
"""


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 240 MB in float16, with about the official proportions: no parameter is more than a
    50th of it (several are in the readers' hands at once), and the pooler's cross-attention, which
    folding drops, is a 15th."""
    folder = tmp_path_factory.mktemp("large")
    raw = config_json("wide")
    raw["text_config"] |= {
        "hidden_size": 512, "num_hidden_layers": 32, "intermediate_size": 1792,
        "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 4000,
    }  # fmt: skip
    raw["latent_attention_config"] |= {
        "hidden_dim": 512, "latent_dim": 512, "num_latents_value": 128, "cross_dim_head": 512,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw))
    shapes = expected_shapes(ModelConfig.from_dict(raw))
    names = sorted(shapes)
    noise = np.random.default_rng(0).standard_normal(2_000_000).astype(np.float16)
    weight_map = {}
    for shard, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{shard + 1}-of-00002.safetensors"
        tensors = {n: np.resize(noise, shapes[n]) for n in part}
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.process
@pytest.mark.parametrize(
    ("dtype", "quantize"),
    [
        ("bfloat16", "none"),
        ("float32", "none"),
        ("bfloat16", "int8"),
        ("bfloat16", "int8-dynamic"),
    ],
)
def test_loading_holds_one_copy(large_checkpoint: Path, dtype: str, quantize: str) -> None:
    """Peak anonymous memory while loading, beside the weights that are kept."""
    command = [sys.executable, "-c", MEASURE, str(large_checkpoint), dtype, quantize]
    # At the official size malloc maps each tensor by itself and gives it back whole. With a low
    # threshold these smaller ones do the same, and fragments of the heap are not measured.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    output = child.stdout
    ratio, kept = map(float, output.split())
    print(f"{dtype}, {quantize}: {ratio:.3f} x {kept / 1e6:.0f} MB")
    assert kept > 100e6
    assert 0.9 < ratio <= 1.1, f"{ratio:.3f} x {kept / 1e6:.0f} MB"


def test_an_unreadable_tensor_list_is_shortened(folder: Path) -> None:
    def rename(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors["theirs." + name] = tensors.pop(name)

    edit(folder, rename)
    config = ModelConfig.from_dir(folder)
    with pytest.raises(CheckpointError, match=r"and \d+ more"):
        Checkpoint(folder).check(config)


def test_weights_are_converted_on_the_device(folder: Path) -> None:
    """What is copied to its place is there already: between devices torch converts on the host."""
    copied: list[tuple[torch.device, torch.device]] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if op._schema.name == "aten::copy_":
                copied.append((args[0].device, args[1].device))
            return op(*args, **(kwargs or {}))

    config, meta = ModelConfig.from_dir(folder), torch.device("meta")
    plain = Products(torch.bfloat16, nn.Linear)
    with Copies():
        load_backbone(folder, config, depth=1, device=meta, dtype=torch.bfloat16, layers=plain)
    assert copied
    assert all(target == source == meta for target, source in copied), copied
