"""Packed forward tokens/s, against the bare matrix products of the same tokens and against a padded
batch, for several mixes of lengths, in one run.

The products (every linear layer of the backbone and the pooler, with the rows that it really sees)
are what no implementation can leave out: the distance to them is what norms, attention,
activations, copies and Python cost. Each way that this processor has to multiply is run, and the
fastest is the bound: the table's `by` names it. The padded batch is what a server computes that
fills every text up to the longest of its batch and masks the rest. FLOPs are
counted by torch on the packed forward; memory is the most anonymous memory beyond the weights.
Times are each batch's least of the rounds, added up: what else runs on the machine then has less
to fall on. Where much else runs, compare CPU time, with one thread.
"""

from __future__ import annotations

import argparse
import ctypes
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model.attention.kernels import AttentionKernel, planner_of
from model.batch import BatchLimits, Encoding, RunnerOptions
from model.errors import UnsupportedError
from model.linear.packed_linear import PackedLinear
from model.packing import PackedBatch, Segments, pack
from model.platform import resources
from model.platform.products import CANDIDATES, layer_of, probe
from model.runner import ModelRunner
from tests.bench import report, workloads

Runs = list[Callable[[], object]]
"""One call for each batch."""


def products(
    model: nn.Module, batches: Sequence[PackedBatch], attend: AttentionKernel, dtype: torch.dtype
) -> dict[str, Runs]:
    """The forward's matrix products alone, on rows of noise: one for each layer, with all rows
    that the layer sees, in however many parts the forward may take them. By every product that is
    right here; torch's own into memory that is already there."""
    rows_of: Counter[nn.Module] = Counter()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | PackedLinear)]

    def counted(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        forward = layer.forward

        def count(x: Tensor) -> Tensor:
            rows_of[layer] += len(x)
            return forward(x)  # type: ignore[no-any-return]

        return count

    for layer in layers:
        layer.forward = counted(layer)
    calls = []
    for batch in batches:
        model(batch, attend)
        calls.append(dict(rows_of))
        rows_of.clear()
    for layer in layers:
        del layer.forward
    most = max(count for rows in calls for count in rows.values())
    inputs = {m.in_features: torch.randn(most, m.in_features).to(dtype) for m in layers}
    outputs = {m.out_features: torch.empty(most, m.out_features, dtype=dtype) for m in layers}
    noise = torch.randn(max(m.out_features for m in layers), max(inputs))
    kind = str(dtype).removeprefix("torch.")
    found = probe(kind, kind, layers[0].in_features, layers[0].out_features)

    def run(
        rows: dict[nn.Module, int], multiply: dict[nn.Module, Callable[[Tensor], object]]
    ) -> None:
        for module, count in rows.items():
            multiply[module](inputs[module.in_features][:count])

    runs: dict[str, Runs] = {}
    for candidate, trial in zip(CANDIDATES[kind], found.trials, strict=True):
        if "wrong" in trial.trouble or "cannot" in trial.trouble:
            continue
        multiply: dict[nn.Module, Callable[[Tensor], object]] = {}
        for m in layers:
            weight = noise[: m.out_features, : m.in_features].contiguous()
            if candidate.layer is nn.Linear:
                weight = weight.to(dtype)
                multiply[m] = partial(_into, weight.T, outputs[m.out_features])
            else:
                multiply[m] = layer_of(candidate.layer, weight, dtype)
        runs[f"products, {candidate.name}"] = [partial(run, rows, multiply) for rows in calls]
    return runs


def _into(weight: Tensor, out: Tensor, x: Tensor) -> None:
    torch.mm(x, weight, out=out[: len(x)])


def padded_attention(lengths: Sequence[int]) -> AttentionKernel:
    """Attention over a padded batch of these real lengths, with the mask that it needs."""
    longest = max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: Segments,
        keys: Segments,
        *,
        causal: bool = False,
        window: int | None = None,
    ) -> Tensor:
        assert not causal
        q, k, v = (x.unflatten(0, (len(lengths), longest)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask[:, None, None], enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2).flatten(0, 1)

    return attend


def padded(model: nn.Module, batches: Sequence[Sequence[Encoding]], device: torch.device) -> Runs:
    runs: Runs = []
    for batch in batches:
        lengths = [len(encoding) for encoding in batch]
        filled = [Encoding(encoding.ids.repeat(1).copy()) for encoding in batch]
        for encoding in filled:
            encoding.ids.resize(max(lengths), refcheck=False)
        runs.append(partial(model, pack(filled, device), padded_attention(lengths)))
    return runs


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--model", default="trunk,small", help="trunk, small, wide, or folders")
    parser.add_argument("--mix", default=",".join(workloads.MIXES))
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or both: a,b")
    parser.add_argument(
        "--against", default="", help="other precisions of the same model: bfloat16:int8-dynamic,…"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="about so many tokens per mix")
    parser.add_argument("--max-batch-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=resources.usable_cores())
    options = parser.parse_args(arguments)
    out = report.Report("forward", __doc__ or "", report.settings_of(options))
    out.start()
    for name in options.model.split(","):
        folder = workloads.checkpoint(name, options.scratch)
        for dtype in options.dtype.split(","):
            runner = ModelRunner(RunnerOptions(str(folder), dtype=dtype, threads=options.threads))
            runner.warm_up()
            others = _others(folder, options)
            for mix in options.mix.split(","):
                _measure(out, runner, others, name, mix, options)
    for row in out.rows:
        if not row["what"].startswith("packed"):
            continue
        key = f"{row['model']} {row['dtype']} {row['mix']}"
        if row["what"] != "packed":
            first = next(r for r in out.rows if {**row, "what": "packed"}.items() >= _key(r))
            ratio = row["tokens_per_s"] / first["tokens_per_s"]
            out.ratios[f"{key}: {row['what']} / packed"] = ratio
            continue
        out.ratios[f"{key}: packed / products by {row['by']}"] = row["of_products"]
        out.ratios[f"{key}: packed / padded"] = row["of_padded"]
        out.ratios[f"{key}: packed / products by {row['by']}, CPU time"] = row["of_products_cpu"]
        out.ratios[f"{key}: packed / padded, CPU time"] = row["of_padded_cpu"]
    for row in out.rows:
        row["mix"] = f"{row['model']} {row['dtype']} {row['mix']}"
    unit = "of the best bare products"  # one scale for models of different sizes
    out.finish(options.results, group="mix", label="what", value="of_products", unit=unit)


def _key(row: dict[str, Any]) -> set[tuple[str, Any]]:
    return {(name, row[name]) for name in ("model", "dtype", "mix", "what")}


def _others(folder: Path, options: argparse.Namespace) -> dict[str, ModelRunner]:
    runners = {}
    for variant in filter(None, options.against.split(",")):
        dtype, _, how = variant.partition(":")
        chosen = RunnerOptions(
            str(folder), dtype=dtype, quantization=how or "none", threads=options.threads
        )
        try:
            runners[variant] = ModelRunner(chosen)
        except UnsupportedError as error:  # int8 that is slower: measured all the same
            print(f"{variant} is refused: {error}")
            allowed = replace(chosen, cpu_products="allow-slow")
            runners[f"{variant} (refused)"] = ModelRunner(allowed)
    return runners


def _onednn_flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * x.numel() * weight[0]


def _mkl_flops(x: torch.Size, packed: torch.Size, plain: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * x.numel() * plain[0]


def _measure(
    out: report.Report,
    runner: ModelRunner,
    others: dict[str, ModelRunner],
    name: str,
    mix: str,
    options: argparse.Namespace,
) -> None:
    model, attend = runner.model, runner._attend
    count = max(1, round(options.tokens / (sum(workloads.lengths_of(mix, 256)) / 256)))
    encodings = workloads.encodings_of(mix, count)
    limits = BatchLimits(options.max_batch_tokens, 256)
    groups = workloads.first_come_batches(encodings, limits)
    planner = planner_of(runner._attend, runner.dtype, causal=False)
    batches = [pack(group, runner.device, planner=planner) for group in groups]
    in_32s = [encodings[i : i + 32] for i in range(0, len(encodings), 32)]

    def packed(runner: ModelRunner) -> Runs:
        return [partial(runner.embed, group) for group in groups]

    alternatives = {
        "packed": packed(runner),
        **{f"packed, {variant}": packed(other) for variant, other in others.items()},
        **products(model, batches, attend, runner.dtype),
        "padded": padded(model, in_32s, runner.device),
    }
    memory = {}
    for what, runs in alternatives.items():
        ctypes.CDLL(None).malloc_trim(0)  # what earlier runs left would hide what this one takes
        before = resources.anonymous_memory()
        with resources.PeakMemory() as peak:
            for run in runs:
                run()
        memory[what] = max(0, peak.bytes - before) / 1e6
    flops_of = {
        torch.ops.mkldnn._linear_pointwise: _onednn_flops,
        torch.ops.mkl._mkl_linear: _mkl_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=flops_of) as counter:
        for batch in batches:
            model(batch, attend)
    seconds = report.alternate(alternatives, options.rounds)

    def total(what: str, of: Callable[[Iterable[float]], float], clock: str) -> float:
        """Seconds for all batches, each batch's being the least or the middle of its rounds."""
        of_batches = zip(*seconds[what], strict=True)
        return sum(of([getattr(times, clock) for times in rounds]) for rounds in of_batches)

    best = {what: total(what, min, "wall") for what in alternatives}
    bound = min((what for what in best if what.startswith("products")), key=best.__getitem__)
    cpu = {what: total(what, min, "cpu") for what in alternatives}
    middle = {what: total(what, report.median, "wall") for what in alternatives}
    real, flops = sum(map(len, encodings)), counter.get_total_flops()
    dtype = runner.info.dtype
    for what, best_seconds in best.items():
        out.add(
            model=name,
            dtype=dtype,
            mix=mix,
            what=what,
            tokens_per_s=real / best_seconds,
            median_tokens_per_s=real / middle[what],
            by=bound.removeprefix("products, "),
            of_products=best[bound] / best_seconds,
            of_padded=best["padded"] / best_seconds,
            of_products_cpu=cpu[bound] / cpu[what],
            of_padded_cpu=cpu["padded"] / cpu[what],
            peak_mb=memory[what],
            **({} if what != "packed" else {"gflops_per_s": flops / best_seconds / 1e9}),
            **({} if what != "packed" else {"mflop_per_token": flops / real / 1e6}),
        )
    out.raw[f"{name} {dtype} {mix}"] = {"tokens": real, "seconds": seconds}
    print(f"measured: {name} {dtype} {mix}", flush=True)


if __name__ == "__main__":
    main()
