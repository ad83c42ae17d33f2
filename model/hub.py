"""Where a checkpoint is: a folder, or a Hugging Face id that is downloaded to the cache.

Torch-free: the front process locates the model before any worker starts. Only safetensors,
JSON and the card are fetched; code and pickles never are.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from model.card import card_license
from model.config import NVEmbedConfig
from model.errors import CheckpointError

logger = logging.getLogger("nv_embed.hub")

_FILES = ["*.json", "*.safetensors", "README.md"]
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
SHIPPED = "nv-embed-small"
"""The model that ships with the package goes by this name, too, as a server shows it."""
PINNED_REVISIONS = {
    "nvidia/NV-Embed-v1": "570834afd5fef5bf3a3c2311a2b6e0a66f6f4f2c",
    "nvidia/NV-Embed-v2": "7604d305b621f14095a1aa23d351674c2859553a",
}
"""What runs when no revision is asked for: the commits that the published MTEB scores name."""
NVIDIA_NOTICE = (
    "These are NVIDIA's NV-Embed weights, licensed CC-BY-NC-4.0: non-commercial use only "
    "(https://creativecommons.org/licenses/by-nc/4.0/)."
)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A checkpoint on disk, and how it got there."""

    model_id: str  # as the user named it; for a folder its last part
    path: Path
    revision: str | None  # the hub's commit; None for a folder
    license: str | None  # from the model card

    @property
    def is_nvidia(self) -> bool:
        return self.model_id.lower().startswith("nvidia/nv-embed")


def locate(model: str | None, *, revision: str | None = None, offline: bool = False) -> ModelSource:
    """Find `model`, downloading it when it is a hub id that is not cached; None is the small
    model that ships with the package.

    Raises CheckpointError with what to do about it.
    """
    if model is None or (model == SHIPPED and not Path(model).exists()):
        model = str(packaged_checkpoint())
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision:
            raise CheckpointError(f"--revision is for hub ids, and {model} is a folder")
        name = NVEmbedConfig.from_dir(folder).name or folder.resolve().name
        return ModelSource(name, folder, None, card_license(folder))
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model} is neither a folder nor a Hugging Face id (owner/name)")
    path = _download(model, revision or PINNED_REVISIONS.get(model), offline)
    # In the cache, a snapshot's folder is named after its commit.
    return ModelSource(model, path, path.name, card_license(path))


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
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import logging as hub_logging

    # Its own log lines come twice, once raw.
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if not offline:
        logger.info("looking for %s on the hub", model)
    try:
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
    except OSError as error:
        raise CheckpointError(f"downloading {model} failed: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """The files that model.safetensors.index.json names, else model.safetensors."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            raise CheckpointError(
                f"{folder} has neither model.safetensors.index.json nor model.safetensors "
                "(other weight formats are not read)"
            )
        return [single]
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read: {error!r}") from error
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index} names files outside its folder")
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder} lacks {', '.join(absent)}; is the download complete?")
    return [folder / name for name in names]
