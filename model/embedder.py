"""A model whole: backbone, its family's pooler, normalisation. forward(PackedBatch) -> [N, D]."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.attention.kernels import AttentionKernel
from model.backbone import MistralBackbone
from model.config import ModelConfig
from model.packing import PackedBatch
from model.poolers import SERVED


class Embedder(nn.Module):
    """The served model. Parameters come from `model.weights.loader`, which folds and fuses."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = MistralBackbone(config)
        self.pooler = SERVED[config.family.pooler](config)

    def forward(self, batch: PackedBatch, attend: AttentionKernel) -> Tensor:
        """-> float32 [N, D], each row of length 1."""
        hidden_states, segments = self.backbone(batch, attend), batch.pooled
        if batch.spans is not None:
            hidden_states = hidden_states.index_select(0, batch.spans.rows)
            segments = batch.spans.segments
        return F.normalize(self.pooler(hidden_states, segments), dim=-1)
