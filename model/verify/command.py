"""`nv-embed verify`: the proof that a checkpoint gives the authors' vectors on this machine.

Opens the checkpoint, runs the checks in their order, prints the table and the line of JSON.
Knows nothing of the server.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict

import torch

from model.batch import default_batch_tokens
from model.errors import CheckpointError, ModelError, UnsupportedError
from model.hub import locate
from model.runner import device_name
from model.verify import authors, precisions, structure
from model.verify.outcome import Check, skipped
from model.verify.referee import Referee
from model.verify.subject import (
    Loaded,
    Measured,
    Subject,
    dtype_name,
    layers_of,
    load,
    no_room,
    peak_memory,
    same,
    sample_encodings,
    say,
    subject_of,
    variant_name,
)


def run(arguments: argparse.Namespace) -> int:
    """Exit status: 0 all within tolerance, 1 some check failed, 2 it cannot run."""
    try:
        return 0 if verify(open_subject(arguments)) else 1
    except ModelError as error:
        print(f"nv-embed verify: {error}", file=sys.stderr)
        return 2


def open_subject(arguments: argparse.Namespace) -> Subject:
    """Locate the checkpoint and resolve the options. Raises ModelError."""
    source = locate(
        arguments.model,
        revision=arguments.revision,
        offline=arguments.offline,
        family=arguments.family,
    )
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    golden = arguments.golden
    if golden is None and (source.path / "golden.json").is_file():
        golden = source.path / "golden.json"
    elif golden is not None and not golden.is_file():
        raise CheckpointError(f"--golden: there is no file {golden}")
    return subject_of(
        source,
        device=arguments.device,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        attention=arguments.attention,
        golden=golden,
        cpu_products=arguments.cpu_products,
        fused_kernels=arguments.fused_kernels,
    )


def verify(subject: Subject) -> bool:
    """Run every check and print the table; the last line on stdout is the JSON report."""
    measured = Measured()
    print(f"model    {subject.source.model_id} ({subject.source.revision or subject.source.path})")
    print(f"device   {subject.device} ({device_name(subject.device)})")
    print(f"dtype    {dtype_name(subject.dtype)}, quantization {subject.quantization}")
    layers = layers_of(subject, subject.dtype, subject.quantization)
    for probe in layers.probes:
        print(f"products {probe}")
    outcomes = []
    for check in run_checks(subject, measured):
        outcomes.append(check)
        print(check, flush=True)
    passed = all(check.status != "failed" for check in outcomes)
    if measured.tokens_per_s is not None and measured.peak_memory_bytes is not None:
        print(f"speed    {measured.tokens_per_s:,.0f} tokens/s")
        print(f"memory   {measured.peak_memory_bytes / 1e9:.2f} GB at the peak")
    left_out = sum(check.status == "skipped" for check in outcomes)
    shown = f"passed ({left_out} skipped)" if left_out else "passed"
    print(shown if passed else "FAILED")
    report = {
        "schema": "nv-embed-verify/1",
        "model": subject.source.model_id,
        "revision": subject.source.revision,
        "device": str(subject.device),
        "device_name": device_name(subject.device),
        "dtype": dtype_name(subject.dtype),
        "quantization": subject.quantization,
        "attention": measured.attention,
        "fused_kernels": subject.fused_kernels,
        "products": [asdict(trial) | {"kind": p.kind} for p in layers.probes for trial in p.trials],
        "versions": _versions(),
        "checks": [asdict(check) for check in outcomes],
        "tokens_per_s": measured.tokens_per_s,
        "peak_memory_bytes": measured.peak_memory_bytes,
        "skipped": left_out,
        "passed": passed,
    }
    print(json.dumps(report, ensure_ascii=False), flush=True)
    return passed


def run_checks(subject: Subject, measured: Measured) -> Iterator[Check]:
    """Every check in turn, cheap ones first; at most one whole model is in memory."""
    tensors = authors.check_tensors(subject)
    yield tensors
    if tensors.status == "failed":
        return  # nothing can be loaded
    yield authors.check_example_ids(subject)
    yield authors.check_eos(subject)
    yield authors.check_golden_ids(subject)
    yield structure.check_backbone(subject)

    variant = variant_name(subject.dtype, subject.quantization)
    with peak_memory(subject.device) as peak:
        working = load(
            subject, subject.dtype, subject.quantization, fused_kernels=subject.fused_kernels
        )
        measured.attention = subject.kernel(subject.dtype)[0]
        yield structure.check_finite(subject, working, measured, variant)
        measured.tokens_per_s = throughput(subject, working)
    measured.peak_memory_bytes = peak.bytes
    yield authors.check_card(subject, working.embed)
    yield structure.check_mask(subject, working)
    yield structure.check_alone(subject, working)
    yield structure.check_pooler(subject, working)
    yield from structure.check_kernels(subject, working)
    yield from structure.check_graphs(subject, working)
    is_referee = variant == "float32" and subject.fused_kernels == "plain"
    exact = working if is_referee else None
    del working  # float32 may need its memory
    reason = None if exact else no_room(subject, torch.float32, "none")
    if reason is None:
        exact = exact or load(subject, torch.float32, "none")
        got = measured.vectors.get("float32")
        measured.vectors["float32"] = exact.embed(sample_encodings(subject))
        if got is not None and not is_referee:
            name = f"{subject.fused_kernels} and plain kernels"
            yield same(name, subject, got, measured.vectors["float32"])
    else:
        say(f"float32 layer by layer, for the whole does not fit: {reason}")
        referee = Referee(subject.source.path, subject.config, subject.device)
        try:
            measured.vectors["float32"] = referee.embed(sample_encodings(subject))
        except UnsupportedError as error:
            yield skipped("float32 layer by layer", str(error))
    yield authors.check_golden_vectors(subject, exact, reason)
    del exact
    yield from precisions.check_precisions(subject, measured)


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("nv-embed-server", "torch", "transformers", "tokenizers", "bitsandbytes"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    versions["cuda"] = torch.version.cuda
    return versions


def throughput(subject: Subject, working: Loaded) -> float:
    """Tokens per second of full batches of the samples."""
    say("measuring tokens per second")
    samples = sample_encodings(subject)
    tokens = sum(map(len, samples))
    copies = max(1, default_batch_tokens(subject.device.type) // tokens)
    working.embed(samples * copies)  # warms up
    runs, begun, elapsed = 0, time.perf_counter(), 0.0
    while not runs or elapsed < subject.measure_seconds:
        working.embed(samples * copies)  # its rows come to the host, so the device is done
        runs, elapsed = runs + 1, time.perf_counter() - begun
    return runs * copies * tokens / elapsed
