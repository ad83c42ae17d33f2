"""The referee: the whole model in float32 by transformers' layers and the published pooler.

One layer is in memory at a time (0.87 GB at the official size), and the pooler after the last, so
that it fits every card. It shares with what serves the tensors on disk alone: no packing, no
kernel, no fold.

Shapes: T tokens of one sequence, D width, N inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
from model.packing import pack
from model.verify.parts import load_plain_pooler
from model.weights.checkpoint import Checkpoint

_BACKBONE = "embedding_model."


class Referee:
    """float32 vectors, which it remembers: each pass reads the whole checkpoint."""

    def __init__(self, folder: Path, config: ModelConfig, device: torch.device) -> None:
        self._folder, self._config, self._device = folder, config, device
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
        batch = pack(encodings, self._device)
        pooler = load_plain_pooler(
            self._folder, self._config, device=self._device, dtype=torch.float32
        )
        pooled = pooler(select_rows(torch.cat(hidden_states), batch), batch.pooled)
        return F.normalize(pooled, dim=-1).cpu().numpy()

    def _hidden_states(self, checkpoint: Checkpoint, encodings: Sequence[Encoding]) -> list[Tensor]:
        """[T, D] of each, the final norm applied."""
        embeddings = checkpoint.rows(f"{_BACKBONE}embed_tokens.weight")
        states = [
            embeddings[torch.from_numpy(e.ids).long()].float().to(self._device) for e in encodings
        ]
        del embeddings
        theirs = mistral_model(replace(self._config, vocab_size=1), 1).to(self._device)
        norm, theirs.norm = theirs.norm, nn.Identity()
        for index in range(self._config.num_hidden_layers):
            _fill(theirs.layers[0], checkpoint, f"{_BACKBONE}layers.{index}.", self._device)
            states = [states_of(theirs, inputs_embeds=x[None]) for x in states]
        _fill(norm, checkpoint, f"{_BACKBONE}norm.", self._device)
        return [norm(x) for x in states]


def _fill(module: nn.Module, checkpoint: Checkpoint, prefix: str, device: torch.device) -> None:
    """The checkpoint's tensors below `prefix`, converted where they will be used."""
    for name, parameter in module.named_parameters():
        parameter.copy_(checkpoint.rows(prefix + name).to(device))


def states_of(theirs: Any, **inputs: Tensor) -> Tensor:
    """-> [T, D] of one sequence [1, T] or [1, T, D] under a full mask. It is given whole, zeros
    everywhere: so no causal and no sliding one is made."""
    (given,) = inputs.values()
    length = given.shape[1]
    full = torch.zeros(1, 1, length, length, device=given.device)
    states: Tensor = theirs(**inputs, attention_mask=full, use_cache=False).last_hidden_state[0]
    return states


def mistral_model(config: ModelConfig, layers: int) -> Any:
    """transformers' MistralModel in float32 on the CPU, values not yet set."""
    from transformers import MistralConfig, MistralModel

    options: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "sliding_window": None,
        "attn_implementation": "sdpa",
        "bos_token_id": None,
        "eos_token_id": None,
    }
    theirs: torch.nn.Module = MistralModel(MistralConfig(**options))
    return theirs.to(torch.float32).eval()
