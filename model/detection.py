"""Which family a checkpoint belongs to: by its hub id, its config.json and the files beside it.

What cannot be told is refused, with what was found; and so is a family that was named where the
folder contradicts it. Torch-free, and reads no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from model import families
from model.errors import CheckpointError, UntoldFamilyError, did_you_mean
from model.families import (
    BGE_EN_ICL,
    BIDIRECTIONAL_MEAN,
    E5_MISTRAL,
    GRITLM,
    NEMOTRON_3_EMBED,
    NV_EMBED,
    Family,
)
from model.files import shown
from model.sentence_transformers_files import SentenceTransformersFiles

HUB_IDS: dict[str, Family] = {
    "nvidia/NV-Embed-v1": NV_EMBED,
    "nvidia/NV-Embed-v2": NV_EMBED,
    "intfloat/e5-mistral-7b-instruct": E5_MISTRAL,
    "Salesforce/SFR-Embedding-Mistral": E5_MISTRAL,
    "Salesforce/SFR-Embedding-2_R": E5_MISTRAL,
    "Linq-AI-Research/Linq-Embed-Mistral": E5_MISTRAL,
    "zeta-alpha-ai/Zeta-Alpha-E5-Mistral": E5_MISTRAL,
    "GritLM/GritLM-7B": GRITLM,
    "BAAI/bge-en-icl": BGE_EN_ICL,
    "nvidia/Nemotron-3-Embed-8B-BF16": NEMOTRON_3_EMBED,
    "nvidia/Nemotron-3-Embed-1B-BF16": NEMOTRON_3_EMBED,
}
_BY_ID = {name.lower(): family for name, family in HUB_IDS.items()}
_MARKED_ROWS = 3
"""Rows of the vocabulary that a family's markers take behind Mistral's 32,000."""
_POOLING = {"avg": "mean", "mean": "mean", "last": "last", "cls": "cls"}
"""Of config.json's `pooling`."""


def recognise(
    raw: Any, files: SentenceTransformersFiles, asked: str = "auto", model_id: str | None = None
) -> Family:
    """The row of a checkpoint. Raises CheckpointError with what was found and what is missing.

    raw: its parsed config.json. asked: a family's name, or auto. model_id: the hub's, if any.
    """
    if not isinstance(raw, dict):
        raise CheckpointError(f"config.json holds {type(raw).__name__}, no object")
    family = _named(asked) if asked != "auto" else _found(raw, files, model_id)
    if family is BIDIRECTIONAL_MEAN:  # a kind of several models, whose files say their prefixes
        passage = files.prompts.get("passage", files.prompts.get("document", family.passage))
        query = files.prompts.get("query", family.query)
        family = replace(family, query=query, passage=passage)
    if against := list(_contradictions(family, raw, files)):
        raise CheckpointError(f"this is no {family.name} model: {'; '.join(against)}")
    return family


def _named(name: str) -> Family:
    for family in families.FAMILIES:
        if family.name == name:
            return family
    known = families.known_families()
    raise CheckpointError(
        f"unknown family {shown(name)}; known: auto, {', '.join(known)}{did_you_mean(name, known)}"
    )


def _found(raw: dict[str, Any], files: SentenceTransformersFiles, model_id: str | None) -> Family:
    kind = raw.get("model_type")
    of_kind = [family for family in families.FAMILIES if family.model_type == kind]
    if not of_kind:
        known = ", ".join(sorted({repr(family.model_type) for family in families.FAMILIES}))
        raise CheckpointError(f"model_type is {shown(kind)}, this server runs {known} only")
    for name in (model_id, raw.get("_name_or_path")):
        known_by_name = _BY_ID.get(name.lower()) if isinstance(name, str) else None
        if known_by_name in of_kind:
            return known_by_name
    if len(of_kind) == 1:
        return of_kind[0]
    if _names_gritlm(raw):
        return GRITLM
    pooling = files.pooling or _pooling(raw)
    if raw.get("is_causal") is False:
        if pooling == "mean":
            of_gritlm = GRITLM.passage in files.prompts.values()  # as `nv-embed export` writes it
            return GRITLM if of_gritlm else BIDIRECTIONAL_MEAN
    elif pooling == "last":
        return BGE_EN_ICL if _has_marked_rows(raw) else E5_MISTRAL
    found = [
        f"model_type {shown(kind)}",
        f"is_causal {shown(raw.get('is_causal'))}",
        f"vocab_size {shown(raw.get('vocab_size'))}",
        f"pooling {files.pooling or 'not said (no 1_Pooling/config.json)'}",
    ]
    nothing_said = pooling is None and raw.get("is_causal") is None
    raise (UntoldFamilyError if nothing_said else CheckpointError)(
        f"which family of models this is cannot be told: {', '.join(found)}. Name it: --family "
        + ", ".join(family.name for family in of_kind)
    )


def _contradictions(
    family: Family, raw: dict[str, Any], files: SentenceTransformersFiles
) -> Iterator[str]:
    """What the folder says that the family's forward does not do."""
    if raw.get("model_type") != family.model_type:
        yield f"model_type is {shown(raw.get('model_type'))}, not {family.model_type!r}"
    for key, value in family.demanded.items():
        if raw.get(key) != value or type(raw.get(key)) is not type(value):
            yield f"{key} is {shown(raw.get(key))}, not {value!r}"
    if family.section is not None:  # a container of its own kind, which says all that there is
        return
    is_causal = raw.get("is_causal")
    said = is_causal is not None and "is_causal" not in family.demanded
    if said and is_causal is not (family.mask == "causal"):
        yield f"is_causal is {shown(is_causal)}, and its mask is {family.mask}"
    pooled = {"1_Pooling/config.json": files.pooling, "pooling": _pooling(raw)}
    for where, found in pooled.items():
        if found not in (None, family.pooler):
            yield f"{where} says {found}, and it pools by {family.pooler}"
    if files.pooling == "mean" and not files.include_prompt and family.left_out == "nothing":
        yield "1_Pooling/config.json leaves prompts out (include_prompt), and it pools all"
    if files.others:
        yield f"modules.json or its settings ask for {', '.join(files.others)}, which it has not"
    if _names_gritlm(raw) and family is not GRITLM and family.model_type == GRITLM.model_type:
        yield "auto_map names GritLM's code"
    if _has_marked_rows(raw) and not family.markers and family.model_type == BGE_EN_ICL.model_type:
        yield f"vocab_size {raw['vocab_size']} has room for the markers of {BGE_EN_ICL.name}"
    yield from _contradicting_prompts(family, files)


def _contradicting_prompts(family: Family, files: SentenceTransformersFiles) -> Iterator[str]:
    """The folder's own prefixes, where they are others."""
    ours = {"query": family.query, "passage": family.passage, "document": family.passage}
    template = None
    if family.template is not None:
        before, _, behind = family.template.partition("{task}")
        template = re.compile(f"{re.escape(before)}.*{re.escape(behind)}", re.DOTALL)
    for name, prefix in files.prompts.items():
        if template is not None and template.fullmatch(prefix):
            continue
        expected = ours.get(name, "" if template is not None else prefix)
        if prefix != expected:
            shape = family.template if family.template is not None else expected
            yield f"its prompt {name!r} is {shown(prefix)}, not {shape!r}"


def _names_gritlm(raw: dict[str, Any]) -> bool:
    auto_map = raw.get("auto_map")
    named = auto_map.values() if isinstance(auto_map, dict) else ()
    return any(isinstance(name, str) and "gritlm" in name.lower() for name in named)


def _has_marked_rows(raw: dict[str, Any]) -> bool:
    return raw.get("vocab_size") == 32_000 + _MARKED_ROWS


def _pooling(raw: dict[str, Any]) -> str | None:
    found = raw.get("pooling")
    return _POOLING.get(found, found) if isinstance(found, str) else None
