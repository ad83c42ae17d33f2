"""A checkpoint -> a folder that sentence-transformers loads, for the same vectors. Torch-free.

No remote code: what a family does is said in the words of transformers and sentence-transformers.
BOS and EOS are put into tokenizer.json itself, for transformers 5 does not read `add_eos_token`.
The weights are not touched: they are linked where that can be, else copied. Knows the files; how
vectors are computed here, `model.tokenizer` and `model.embedder` know.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from tqdm import tqdm

from model.card import licence_files
from model.config import ModelConfig
from model.errors import FileError, UnsupportedError
from model.families import Family
from model.files import read_json
from model.hub import ModelSource
from model.prompts import written
from model.tasks import TASKS
from model.tokenizer import BOS_ID, EOS_ID, NVEmbedTokenizer
from model.tokenizer_file import read_tokenizer
from model.user_files import TEMPORARY
from model.weights.headers import INDEX, weight_files

_NEEDS = {
    "causal": "Tried with sentence-transformers 5.7 (transformers 4.57) and 6.2 (5.23).",
    "full": "It needs transformers 5.2 or later: older ones compute a causal mask, and so other "
    "vectors, of which sentence-transformers warns at most.",
}
"""By Family.mask."""
_MODES = {"last": "lasttoken", "mean": "mean_tokens"}
_CHUNK = 16 << 20


def export(source: ModelSource, folder: Path) -> list[str]:
    """Write `folder`, whole or not at all; an empty one is filled. Returns what a user must know of
    it, in sentences.

    Raises UnsupportedError for a family that needs code of its own, FileError where the folder is
    not empty or cannot be made, CheckpointError for a checkpoint that is none.
    """
    config = source.config()
    family = config.family
    if family.pooler not in _MODES:
        raise UnsupportedError(
            f"this is an {family.name} model, whose {family.pooler} pooler sentence-transformers "
            "has only as remote code: nothing was exported"
        )
    NVEmbedTokenizer.from_dir(source.path, config=config)  # refused here rather than there
    with _new_folder(folder) as part:
        write_settings(read_json(source.path / "config.json"), part, config)
        _write_tokenizer(source.path, part, config)
        papers = [*licence_files(source.path), source.path / "README.md"]
        for paper in papers:
            if paper.is_file():
                shutil.copyfile(paper, part / paper.name)
        _link_weights(source.path, part)
    licence = f"is {source.license}" if source.license else "is named by no model card: look it up"
    said = [_NEEDS[family.mask], *_differences(family), f"The licence of the weights {licence}."]
    return [*said, *([source.notice] if source.notice else [])]


def _differences(family: Family) -> Iterator[str]:
    """From the vectors of the family itself."""
    if family.suffix:
        yield (
            f"Write {family.suffix!r} behind each query yourself, for a prompt there stands before "
            "a text alone; it is lost when the query is cut."
        )
    if family.round_trip:
        yield (
            "Its authors tokenize a query twice, which leaves a space behind each marker: queries "
            "by this server's template have other vectors; those by prompt and suffix have these."
        )


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder that takes the name `folder` when the block ends well, and else vanishes."""
    try:
        with suppress(FileNotFoundError):
            folder.lstat()
            if not folder.is_dir() or any(folder.iterdir()):
                raise FileError(f"{folder} is there, and no empty folder: name another")
        # One that is there may be a link, a mount, or where somebody stands: it stays itself.
        fills = folder.is_dir()
        part = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder if fills else folder.parent))
        umask = os.umask(0o077)
        os.umask(umask)
        part.chmod(0o777 & ~umask)  # it is 0700 till here
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise FileError(f"{folder} cannot be made: {why}") from None
    try:
        yield part
        if fills:
            for path in sorted(part.iterdir(), key=lambda path: path.name == "config.json"):
                path.rename(folder / path.name)  # without the last one it is no model
            part.rmdir()
        else:
            part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def write_settings(raw: dict[str, Any], folder: Path, config: ModelConfig) -> None:
    """Into `folder`: what tells the family of a checkpoint whose config.json is `raw`, in the words
    of transformers' and sentence-transformers' own files."""
    raw = {key: value for key, value in raw.items() if key != "auto_map"}
    if config.family.mask == "full":
        raw |= {"is_causal": False, "sliding_window": config.sliding_window}
    _write(folder / "config.json", raw)
    _write_modules(folder, config)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _write_tokenizer(source: Path, folder: Path, config: ModelConfig) -> None:
    tokenizer = read_tokenizer(source, byte_level=config.family.byte_level)
    tokenizer.post_processor = TemplateProcessing(
        single=f"<s> $A{_eos(config.family)}",
        pair=f"<s> $A{_eos(config.family)} <s>:1 $B:1{_eos(config.family, ':1')}",
        special_tokens=[("<s>", BOS_ID), ("</s>", EOS_ID)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    unknown = {"unk_token": "<unk>"} if _has(tokenizer, "<unk>") else {}
    _write(
        folder / "tokenizer_config.json",
        {
            # Those named after a model put BOS and EOS by their own settings.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_input_tokens,
            "padding_side": "right",
            **tokens,
            **unknown,
        },
    )


def _has(tokenizer: Tokenizer, piece: str) -> bool:
    return tokenizer.token_to_id(piece) is not None


def _eos(family: Family, of_type: str = "") -> str:
    return "" if family.keeps_eos is None else f" </s>{of_type}"


def _write_modules(folder: Path, config: ModelConfig) -> None:
    """sentence-transformers' own files, in the form that releases 5 and 6 read."""
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": f"{index}_{kind}" if index else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, kind in enumerate(("Transformer", "Pooling", "Normalize"))
    ]
    _write(folder / "modules.json", modules)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "2_Normalize").mkdir(exist_ok=True)
    mode = _MODES[config.family.pooler]
    modes = {f"pooling_mode_{m}": m == mode for m in ("cls_token", "max_tokens", *_MODES.values())}
    _write(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": config.hidden_size,
            **modes,
            "include_prompt": config.family.left_out == "nothing",
        },
    )
    _write(
        folder / "sentence_bert_config.json",
        {"max_seq_length": config.max_input_tokens, "do_lower_case": False},
    )
    prompts, bare = _prompts(config)
    _write(
        folder / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": bare, "similarity_fn_name": "cosine"},
    )


def _prompts(config: ModelConfig) -> tuple[dict[str, str], str | None]:
    """The model's own by name, with one for each side; and that of a text of which nothing is said,
    a passage, where passages have a prefix."""
    family, prompts = config.family, dict(config.prompts)
    task = "" if family.template is None else TASKS["NQ"].query
    prompts.setdefault("query", written(family.prompt("query", task).prefix))
    # Where this name is missing, its encode_document puts nothing before a text.
    prompts.setdefault("document", family.passage)
    return prompts, "document" if prompts["document"] else None


def _link_weights(source: Path, folder: Path) -> None:
    """The shards as they are, and their index."""
    files = weight_files(source)
    if (source / INDEX).is_file():
        shutil.copyfile(source / INDEX, folder / INDEX)
    total = sum(file.size for file in files)
    bar = tqdm(desc="Weights", total=total, unit="B", unit_scale=True, disable=None)
    with bar:
        for file in files:
            target = folder / file.path.name
            try:
                os.link(file.path.resolve(), target)  # in the hub's cache it is a link itself
                bar.update(file.size)
            except OSError:  # another disk, or one without links
                with file.path.open("rb") as read, target.open("wb") as copy:
                    while chunk := read.read(_CHUNK):
                        copy.write(chunk)
                        bar.update(len(chunk))
