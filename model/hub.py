"""Where a checkpoint is: a folder, or a Hugging Face id that is downloaded to the cache.

Knows what may be named, and nothing of what the files hold but whose they are. Torch-free: the
front process locates the model before any worker starts. Only safetensors, JSON and the card are
fetched; code and pickles never are.
"""

from __future__ import annotations

import logging
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from model.card import card_license
from model.config import ModelConfig
from model.errors import CheckpointError
from model.files import shown
from model.weights.headers import unread_files

logger = logging.getLogger("nv_embed.hub")

_FILES = ["*.json", "*.safetensors", "README.md"]
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
SHIPPED = "nv-embed-small"
"""The model that ships with the package goes by this name, too, as a server shows it."""
PINNED_REVISIONS = {
    "nvidia/NV-Embed-v1": "570834afd5fef5bf3a3c2311a2b6e0a66f6f4f2c",
    "nvidia/NV-Embed-v2": "7604d305b621f14095a1aa23d351674c2859553a",
    "intfloat/e5-mistral-7b-instruct": "07163b72af1488142a360786df853f237b1a3ca1",
    "Salesforce/SFR-Embedding-Mistral": "938c560d1c236aa563b2dbdf084f28ab28bccb11",
    "Salesforce/SFR-Embedding-2_R": "91762139d94ed4371a9fa31db5551272e0b83818",
    "Linq-AI-Research/Linq-Embed-Mistral": "0c1a0b0589177079acc552433cad51d7c9132379",
    "zeta-alpha-ai/Zeta-Alpha-E5-Mistral": "c791d37474fa6a5c72eb3a2522be346bc21fbfc3",
    "GritLM/GritLM-7B": "13f00a0e36500c80ce12870ea513846a066004af",
    "BAAI/bge-en-icl": "971c7e1445cc86656ca0bd85ed770b8675a40bb5",
    "nvidia/Nemotron-3-Embed-8B-BF16": "dd9d06b1852ef836d3dc2fbd2b71a34356912759",
    "nvidia/Nemotron-3-Embed-1B-BF16": "f880174635613cff04033875fc6a69296cb72006",
}
"""What runs when no revision is asked for: the commits that the published MTEB scores name."""
_PINNED = {name.lower(): name for name in PINNED_REVISIONS}
_NON_COMMERCIAL = (
    "These are {whose} weights, licensed CC-BY-NC-4.0: non-commercial use only "
    "(https://creativecommons.org/licenses/by-nc/4.0/)."
)
_WHOSE = {
    "nvidia/nv-embed": "NVIDIA's NV-Embed",
    "salesforce/sfr-embedding": "Salesforce's SFR-Embedding",
    "linq-ai-research/linq-embed": "Linq's Linq-Embed",
}
"""By how an id begins, in lower case. The other pinned models allow commercial use (MIT,
Apache-2.0; Nemotron-3-Embed: OpenMDW-1.1)."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A checkpoint on disk, and how it got there."""

    model_id: str  # as the user named it; for a folder its last part
    path: Path
    revision: str | None  # the hub's commit; None for a folder
    license: str | None  # from the model card
    family: str = "auto"  # as asked for, or what the hub's id says

    @property
    def notice(self) -> str | None:
        """What a user must know of the licence, where it forbids something."""
        for start, whose in _WHOSE.items():
            if self.model_id.lower().startswith(start):
                return _NON_COMMERCIAL.format(whose=whose)
        return None

    def config(self) -> ModelConfig:
        """Raises CheckpointError."""
        return ModelConfig.from_dir(self.path, self.family, self.model_id)


def locate(
    model: str | None,
    *,
    revision: str | None = None,
    offline: bool = False,
    family: str = "auto",
) -> ModelSource:
    """Find `model`, downloading it when it is a hub id that is not cached; None is the small
    model that ships with the package. family: as in ModelConfig.from_dir.

    Raises CheckpointError with what to do about it.
    """
    if model is None or (model == SHIPPED and not Path(model).exists()):
        model = str(packaged_checkpoint())
    if folder := _folder(model):
        if revision:
            raise CheckpointError(f"--revision is for hub ids, and {_said(model)} is a folder")
        if _HUB_ID.fullmatch(model):
            logger.log(
                logging.WARNING if model.lower() in _PINNED else logging.INFO,
                "the model is the folder %s, not the hub's %s (write ./%s to mean the folder)",
                folder.resolve(),
                model,
                model,
            )
        config = ModelConfig.from_dir(folder, family)
        name = _name(config.name, folder)
        if unread := unread_files(folder):
            logger.warning("not read, for it is no part of the weights: %s", ", ".join(unread))
        return ModelSource(name, folder, None, card_license(folder), config.family.name)
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"{_said(model)} is neither a folder nor a Hugging Face id (owner/name)"
        )
    # The hub finds a model whatever the case of its id; its pin must be found likewise.
    known = _PINNED.get(model.lower(), model)
    path = _download(known, revision or PINNED_REVISIONS.get(known), offline)
    # In the cache, a snapshot's folder is named after its commit.
    config = ModelConfig.from_dir(path, family, known)
    return ModelSource(model, path, path.name, card_license(path), config.family.name)


def _folder(model: str) -> Path | None:
    """The folder that `model` names; None where there is nothing of that name."""
    if not model.strip():
        raise CheckpointError(
            "--model is empty: name a folder or a Hugging Face id, or leave it out for the small "
            "model that ships"
        )
    try:
        folder = Path(model).expanduser()
        mode = folder.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, RuntimeError, ValueError) as error:  # no such user's ~, a NUL, too long
        raise CheckpointError(f"--model {_said(model)}: {error}") from None
    if not stat.S_ISDIR(mode):
        raise CheckpointError(
            f"--model {_said(model)} is a file: name the folder that holds config.json, "
            "tokenizer.json and *.safetensors"
        )
    return folder


def _name(said: str | None, folder: Path) -> str:
    """The id of a folder's model: what its config says, unless that is a path of the machine
    that it was saved on, or no name at all."""
    if said and not _NAME.fullmatch(said):
        said = re.sub(r"[^\w.-]+", "-", re.split(r"[/\\]", said.rstrip("/\\"))[-1]).strip(".-")
    return (said or "")[:200] or "".join(
        c if c.isprintable() else "-" for c in folder.resolve().name
    )


def _said(model: str) -> str:
    return model if model.isprintable() and len(model) <= 200 else shown(model)


def packaged_checkpoint() -> Path:
    """The folder of the small trained model that ships with the package."""
    folder = Path(__file__).parent / "checkpoints" / SHIPPED
    if not (folder / "config.json").is_file():
        raise CheckpointError("no model was named, and this installation holds none: use --model")
    return folder


def _download(model: str, revision: str | None, offline: bool) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    # Its own log lines come twice, once raw.
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        validate_repo_id(model)
        if not offline:
            logger.info("looking for %s on the hub", model)
        return Path(
            huggingface_hub.snapshot_download(
                model, revision=revision, local_files_only=offline, allow_patterns=_FILES
            )
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"{model} is gated: accept its terms on the hub and set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{model} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"no folder here and no hub model is named {model}") from error
    except LocalEntryNotFoundError as error:
        why = "--offline was given" if offline else "the hub cannot be reached (network? proxy?)"
        raise CheckpointError(
            f"there is no folder {model} here, it is not in the local cache, and {why}; a folder "
            "that was downloaded elsewhere can be named instead"
        ) from error
    except HFValidationError:
        raise CheckpointError(
            f"there is no folder {_said(model)}, and no hub model can be named so"
        ) from None
    except Exception as error:  # whatever the HTTP client below raises, in several lines
        words = " ".join(f"{error}".split()) or type(error).__name__
        raise CheckpointError(f"downloading {model} failed: {words}") from error
