"""Checks of what holds for every checkpoint: one part of the model against another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from model import cuda_graphs
from model.attention.kernels import available_kernels, choose_kernel
from model.batch import Encoding
from model.errors import UnsupportedError
from model.packing import pack
from model.tokenizer import BOS_ID
from model.verify.outcome import Check, at_most, finite, skipped, status_of
from model.verify.parts import load_backbone, load_plain_pooler
from model.verify.referee import states_of, transformers_model
from model.verify.subject import (
    SAMPLES,
    VECTOR_TOLERANCE,
    Loaded,
    Measured,
    Subject,
    layers_of,
    same,
    sample_encodings,
    say,
    too_large,
)
from model.weights.loader import empty_model

FOLDED_COSINE = 0.9999
REFEREE_LAYERS = 2
_NARROW = 16
"""Of a window that most samples are longer than."""


def check_finite(subject: Subject, working: Loaded, measured: Measured, variant: str) -> Check:
    """Finite vectors of length 1; they are kept for the comparisons."""
    rows = measured.vectors[variant] = working.embed(sample_encodings(subject))
    worst = float(np.abs(np.linalg.norm(rows, axis=1) - 1).max())
    return at_most("length of the vectors", worst, 1e-5, "distance from 1")


def check_mask(subject: Subject, working: Loaded) -> Check:
    """Another last word changes what a full mask makes of the first ones, and a causal one not."""
    text = subject.tokenizer.encode(SAMPLES[1][1], max_tokens=4096)
    changed = text.ids.copy()
    changed[-2] = next(i for i in (*changed[1:], BOS_ID) if i != changed[-2])  # EOS may follow
    before, after = (
        working.hidden_states(pack([Encoding(ids)], subject.device)).float()
        for ids in (text.ids, changed)
    )
    moved = (after - before).norm(dim=-1) / before.norm(dim=-1)
    early = float(moved[1 : len(moved) // 2].median())
    note = "relative change of the early rows when the last word changes"
    if subject.authors.causal:
        return at_most("attention sees nothing ahead", early, 1e-3, note)
    return Check(
        "attention sees ahead", status_of(early > 1e-3), finite(early), "> 0.001", note=note
    )


def check_alone(subject: Subject, working: Loaded) -> Check:
    """A text's vector alone is its vector among others."""
    samples = sample_encodings(subject)
    together = working.embed(samples)
    alone = np.concatenate([working.embed([encoding]) for encoding in samples])
    return same("alone and together", subject, alone, together)


def check_backbone(subject: Subject) -> Check:
    """The first layers, on the real weights, against transformers' MistralModel (float32)."""
    name = "backbone's first layers"
    config, window = subject.config, subject.config.sliding_window
    authors = subject.authors
    if authors.causal:  # the samples are shorter than the window, and it has to be seen
        window = min(window or _NARROW, _NARROW)
        config = replace(config, sliding_window=window)
    layers = min(REFEREE_LAYERS, config.num_hidden_layers)
    try:
        theirs = transformers_model(subject.source.path, config, layers, sliding_window=window)
    except UnsupportedError as error:
        return skipped(name, str(error))
    model = empty_model(config, dtype=torch.float32).backbone
    parts = [model.embed_tokens, *list(model.layers)[:layers]]
    needed = 2 * sum(p.nbytes for part in parts for p in part.parameters())
    if reason := too_large(needed, subject.device):
        return skipped(name, reason)
    say(f"loading {layers} layers twice for the referee")
    ours, tensors = load_backbone(
        subject.source.path,
        config,
        depth=layers,
        device=subject.device,
        dtype=torch.float32,
        layers=layers_of(subject, torch.float32, "none"),
    )
    theirs.load_state_dict(tensors)
    theirs.to(subject.device)
    differences = []
    for sample in sample_encodings(subject):
        batch = pack([sample], subject.device, pooled="all")
        with torch.inference_mode():
            got = ours(batch, subject.kernel(torch.float32)[1])
            expected = states_of(theirs, authors.causal, input_ids=batch.input_ids.long()[None])
        differences.append(float((got - expected).abs().max() / expected.abs().max()))
    mask = f"a causal mask of {window} tokens" if authors.causal else "a full mask"
    note = f"relative to transformers' layers under {mask}, {layers} layers, float32"
    return at_most(name, float(np.max(differences)), VECTOR_TOLERANCE, note)


def check_pooler(subject: Subject, working: Loaded) -> Check:
    """The pooler as it serves against the plain one, on real hidden states in the working dtype."""
    authors = subject.authors
    encodings = sample_encodings(subject)
    if authors.pooler != "latent":
        states = working.hidden_states(pack(encodings, subject.device, pooled="all"))
        each = torch.split(states, [len(encoding) for encoding in encodings])
        rows = [authors.pooled(*one) for one in zip(each, encodings, strict=True)]
        expected = torch.stack(rows).cpu().numpy()
        return same("pooler", subject, working.embed(encodings), expected, cosine=FOLDED_COSINE)
    batch = pack(encodings, subject.device)
    hidden_states = working.hidden_states(batch)
    plain = load_plain_pooler(
        subject.source.path, subject.config, device=subject.device, dtype=subject.dtype
    )
    with torch.inference_mode():
        got, expected = (
            F.normalize(pooler(hidden_states, batch.pooled), dim=-1).cpu().numpy()
            for pooler in (working.model.pooler, plain)
        )
    return same("folded pooler", subject, got, expected, cosine=FOLDED_COSINE)


def check_kernels(subject: Subject, working: Loaded) -> Iterator[Check]:
    """Every attention kernel that runs here against the one in use."""
    samples = sample_encodings(subject)
    used = subject.kernel(subject.dtype)[0]
    expected = working.embed(samples)
    for name in available_kernels(subject.device, subject.dtype):
        if name != used:
            _, attend = choose_kernel(name, subject.device, subject.dtype)
            yield same(f"{name} and {used}", subject, working.embed(samples, attend), expected)


def check_graphs(subject: Subject, working: Loaded) -> Iterator[Check]:
    """Recorded forwards against eager ones, sample by sample and the shortest together."""
    name = "CUDA graphs and eager"
    try:
        cuda_graphs.check(subject.device, subject.kernel(subject.dtype)[0], subject.quantization)
    except UnsupportedError as error:
        yield skipped(name, str(error))
        return
    with torch.inference_mode():
        forward = working.recorded()
        samples = [e for e in sample_encodings(subject) if len(e) <= cuda_graphs.SIZES[-1]]
        short = sorted(samples, key=len)[:4]
        batches = [*([sample] for sample in samples), short]
        got = []
        for batch in batches:
            rows = forward(batch)
            assert rows is not None, batch
            got.append(rows.cpu().numpy())  # at once: the next replay may overwrite them
    expected = working.embed([encoding for batch in batches for encoding in batch])
    yield same(name, subject, np.concatenate(got), expected)
