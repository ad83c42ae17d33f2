"""The referee: the whole model in float32 by transformers' layers and the authors' pooler.

One layer is in memory at a time (0.87 GB at the official size), and the pooler after the last, so
that it fits every card. It shares with what serves the tensors on disk alone: no packing, no
kernel, no fold.

Shapes: T tokens of one sequence, D width, N inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model.backbone import select_rows
from model.batch import Encoding
from model.config import ModelConfig
from model.errors import UnsupportedError
from model.files import read_json
from model.packing import pack
from model.verify.authors_models import AUTHORS_MODELS
from model.verify.parts import load_plain_pooler
from model.weights.checkpoint import Checkpoint


class Referee:
    """float32 vectors, which it remembers: each pass reads the whole checkpoint."""

    def __init__(self, folder: Path, config: ModelConfig, device: torch.device) -> None:
        self._folder, self._config, self._device = folder, config, device
        self._authors = AUTHORS_MODELS[config.family.name]
        self._known: dict[bytes, NDArray[np.float32]] = {}

    def embed(self, encodings: Sequence[Encoding]) -> NDArray[np.float32]:
        """-> [N, D]. Raises CheckpointError."""
        new = {e.key: e for e in encodings if e.key not in self._known}
        if new:
            rows = self._vectors(list(new.values()))
            self._known |= dict(zip(new, rows, strict=True))
        return np.stack([self._known[e.key] for e in encodings])

    @torch.inference_mode()
    def _vectors(self, encodings: Sequence[Encoding]) -> NDArray[np.float32]:
        checkpoint = Checkpoint(self._folder)
        checkpoint.check(self._config)
        hidden_states = self._hidden_states(checkpoint, encodings)
        if self._authors.pooler != "latent":
            each = zip(hidden_states, encodings, strict=True)
            return torch.stack([self._authors.pooled(*one) for one in each]).cpu().numpy()
        batch = pack(encodings, self._device)
        pooler = load_plain_pooler(
            self._folder, self._config, device=self._device, dtype=torch.float32
        )
        pooled = pooler(select_rows(torch.cat(hidden_states), batch), batch.pooled)
        return F.normalize(pooled, dim=-1).cpu().numpy()

    def _hidden_states(self, checkpoint: Checkpoint, encodings: Sequence[Encoding]) -> list[Tensor]:
        """[T, D] of each, the final norm applied."""
        names = self._config.family.prefix
        embeddings = checkpoint.rows(f"{names}embed_tokens.weight")
        states = [
            embeddings[torch.from_numpy(e.ids).long()].float().to(self._device) for e in encodings
        ]
        del embeddings
        theirs = transformers_model(self._folder, self._config, 1, vocab_size=1).to(self._device)
        norm, theirs.norm = theirs.norm, nn.Identity()
        for index in range(self._config.num_hidden_layers):
            _fill(theirs.layers[0], checkpoint, f"{names}layers.{index}.", self._device)
            states = [
                states_of(theirs, self._authors.causal, inputs_embeds=x[None]) for x in states
            ]
        _fill(norm, checkpoint, f"{names}norm.", self._device)
        return [norm(x) for x in states]


def _fill(module: nn.Module, checkpoint: Checkpoint, prefix: str, device: torch.device) -> None:
    """The checkpoint's tensors below `prefix`, converted where they will be used."""
    for name, parameter in module.named_parameters():
        parameter.copy_(checkpoint.rows(prefix + name).to(device))


def states_of(theirs: Any, causal: bool, **inputs: Tensor) -> Tensor:
    """-> [T, D] of one sequence [1, T] or [1, T, D]. The causal mask and its window are made by
    transformers; a full one is given whole, zeros everywhere, so that none is made."""
    (given,) = inputs.values()
    length = given.shape[1]
    mask = None if causal else torch.zeros(1, 1, length, length, device=given.device)
    states: Tensor = theirs(**inputs, attention_mask=mask, use_cache=False).last_hidden_state[0]
    return states


def transformers_model(
    folder: Path, config: ModelConfig, layers: int, **changes: int | None
) -> Any:
    """transformers' MistralModel or Ministral3Model in float32 on the CPU, values not yet set. Its
    settings are those of config.json itself, but for `changes`. Raises UnsupportedError where the
    installed transformers has no such model."""
    import transformers

    raw = read_json(folder / "config.json")
    text = raw if config.family.section is None else raw[config.family.section]
    kind = "Ministral3" if config.family.model_type == "ministral3" else "Mistral"
    ours = {"_name_or_path", "architectures", "auto_map", "dtype", "model_type", "torch_dtype"}
    options = {key: value for key, value in text.items() if key not in ours}
    # None of them is in a test's vocabulary of one.
    options |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    of_kind = getattr(transformers, f"{kind}Model", None)
    if of_kind is None:
        raise UnsupportedError(
            f"transformers {transformers.__version__} has no {kind}Model to compare with: it came "
            "with 5.0"
        )
    options |= {"num_hidden_layers": layers, "attn_implementation": "sdpa", **changes}
    settings = getattr(transformers, f"{kind}Config")(**options)
    theirs: torch.nn.Module = of_kind(settings)
    return theirs.to(torch.float32).eval()
