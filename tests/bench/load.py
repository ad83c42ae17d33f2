"""Time to ready and peak anonymous memory of loading a random checkpoint, float16 on disk.

Each variant loads in a fresh process, embeds one short text, and reports seconds from the start of
loading to ready, the same for reading the files alone (the bound; the page cache may hold them, as
it may for the load), the weights as they are kept, and the most anonymous memory beyond what the
process had before. The default has the official width with few layers; --true-size writes the whole
7.85 billion parameters (15.7 GB) into the scratch folder, once.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model.config import ModelConfig
from model.platform import resources
from model.weights.names import expected_shapes
from tests.bench import report, workloads
from tests.checkpoints import official_tokenizer
from tests.model.test_config import OFFICIAL

_SHARD_BYTES = 5 * 10**9
_CHILD = """
import json, sys, time
import numpy as np, torch
from model.linear import quantization
from model.platform import resources
from model.batch import Encoding, RunnerOptions
from model.weights.loader import empty_model
from model.runner import ModelRunner
folder, dtype, how, threads = sys.argv[1:]
if how == "int8":
    quantization.quantize([torch.zeros(8, 8)], 8, torch.device("cpu"))  # its own memory
before = resources.anonymous_memory()
started = time.perf_counter()
with resources.PeakMemory() as peak:
    runner = ModelRunner(RunnerOptions(folder, dtype=dtype, quantization=how, threads=int(threads),
        cpu_products="allow-slow"))
loaded = time.perf_counter()
runner.warm_up()
ready = time.perf_counter()
row = runner.embed([Encoding(np.arange(1, 17, dtype=np.int32))])
assert np.isfinite(row).all()
empty = empty_model(runner.config, quantize=how, dtype=runner.dtype)
kept = sum(p.numel() * p.element_size() for p in empty.parameters())
full = 4 * sum(p.numel() for p in empty_model(runner.config).parameters())
print(json.dumps({"ready_s": ready - started, "load_s": loaded - started,
    "one_text_s": time.perf_counter() - ready, "kept_gb": kept / 1e9,
    "peak_gb": (peak.bytes - before) / 1e9, "peak_of_kept": (peak.bytes - before) / kept,
    "kept_of_float32": kept / full, "peak_of_float32": (peak.bytes - before) / full}))
"""


def write_random(folder: Path, layers: int) -> Path:
    """An official-layout checkpoint of the official width; the same noise in every tensor."""
    raw = json.loads(json.dumps(OFFICIAL))
    raw["text_config"]["num_hidden_layers"] = layers
    shapes = expected_shapes(ModelConfig.from_dict(raw))
    folder.mkdir(parents=True)
    noise = (np.random.default_rng(3).standard_normal(1 << 24) * 0.02).astype(np.float16)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if size + 2 * math.prod(shape) > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += 2 * math.prod(shape)
    weight_map = {}
    for number, part in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / file, part, noise)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    official_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], noise: np.ndarray) -> None:
    """safetensors, written piece by piece: a shard need not fit into memory."""
    header: dict[str, Any] = {}
    at = 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, end]}
        at = end
    head = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for shape in shapes.values():
            left = math.prod(shape)
            while left:
                part = noise[: min(left, len(noise))]
                file.write(part.tobytes())
                left -= len(part)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--layers", type=int, default=2, help="of the official 32")
    parser.add_argument("--true-size", action="store_true", help="all layers: 15.7 GB")
    parser.add_argument("--model", help="a checkpoint that exists, in place of a random one")
    parser.add_argument("--variants", default="bfloat16:none,bfloat16:int8,bfloat16:int8-dynamic")
    parser.add_argument("--threads", type=int, default=resources.usable_cores())
    options = parser.parse_args(arguments)
    out = report.Report("load", __doc__ or "", report.settings_of(options))
    out.start()
    layers = OFFICIAL["text_config"]["num_hidden_layers"] if options.true_size else options.layers
    if options.model:
        folder = workloads.checkpoint(options.model, options.scratch)
    else:
        folder = options.scratch / f"official-{layers}-layers"
        if not (folder / "config.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            write_random(folder, layers)
    for variant in options.variants.split(","):
        dtype, _, how = variant.partition(":")
        started = time.perf_counter()
        read = sum(_read(path) for path in sorted(folder.glob("*.safetensors")))
        reading = time.perf_counter() - started
        command = [sys.executable, "-c", _CHILD, str(folder), dtype, how, str(options.threads)]
        child = subprocess.run(command, check=True, capture_output=True, text=True)
        figures = json.loads(child.stdout.splitlines()[-1])
        out.add(variant=variant, what="load", disk_gb=read / 1e9, read_s=reading, **figures)
        out.ratios[f"{variant}: peak / weights kept"] = figures["peak_of_kept"]
        out.ratios[f"{variant}: weights kept / float32"] = figures["kept_of_float32"]
        out.ratios[f"{variant}: peak / float32"] = figures["peak_of_float32"]
        out.ratios[f"{variant}: reading the files / ready"] = reading / figures["ready_s"]
    out.finish(options.results, group="variant", label="what", value="peak_gb", unit="peak GB")


def _read(path: Path) -> int:
    size = 0
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(1 << 24)
        while count := file.readinto(buffer):
            size += count
    return size


if __name__ == "__main__":
    main()
