"""The losses, also of shortened vectors.

Shapes: N queries, M hard negatives of each, D width; all rows of length 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def nested(loss: Callable[..., Tensor], widths: Sequence[int], *rows: Tensor) -> Tensor:
    """The mean of `loss` of the rows [., D] and of their first so many numbers, of length 1 again.

    Without widths that of the rows alone (Matryoshka representations: Kusupati et al. 2022).
    """
    shortened = [[F.normalize(each[:, :width], dim=-1) for each in rows] for width in widths]
    return torch.stack([loss(*parts) for parts in (rows, *shortened)]).mean()


def contrastive_loss(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor,
    owners: Tensor,
    *,
    temperature: float,
    in_batch: bool,
    same: Tensor | None = None,
    same_negatives: Tensor | None = None,
) -> Tensor:
    """Mean over queries of -log softmax of the positive's cosine / temperature (InfoNCE).

    queries, positives [N, D]; negatives [M, D], the hard negatives of all queries;
    owners [M]: whose negative each one is.
    in_batch: the positives and hard negatives of the other queries count as negatives too
    (stage 1); otherwise only a query's own hard negatives do (stage 2).
    same [N, N] bool: pairs whose positives are the same text, never one another's negatives.
    same_negatives [N, M] bool: hard negatives that are the text of this query's positive.
    """
    count = len(queries)
    own = (queries * positives).sum(-1, keepdim=True)
    identity = torch.eye(count, dtype=torch.bool, device=queries.device)
    to_positives = queries @ positives.T
    to_negatives = queries @ negatives.T
    if in_batch:
        hidden = identity if same is None else identity | same
        none = torch.zeros_like(to_negatives, dtype=torch.bool)
        hidden_negatives = none if same_negatives is None else same_negatives
    else:
        hidden = torch.ones_like(identity)
        hidden_negatives = owners[None, :] != torch.arange(count, device=owners.device)[:, None]
    scores = torch.cat(
        [
            own,
            to_positives.masked_fill(hidden, -torch.inf),
            to_negatives.masked_fill(hidden_negatives, -torch.inf),
        ],
        dim=1,
    )
    target = torch.zeros(count, dtype=torch.long, device=queries.device)
    return F.cross_entropy(scores.float() / temperature, target)


def soft_label_loss(
    queries: Tensor,
    documents: Tensor,
    teacher_queries: Tensor,
    teacher_documents: Tensor,
    *,
    temperature: float,
) -> Tensor:
    """Mean over queries of KL(the teacher's softmax over the documents || the learner's).

    queries and the teacher's of them [N, D], documents and the teacher's of them [M, D].
    """
    wanted = (teacher_queries @ teacher_documents.T / temperature).log_softmax(-1)
    found = (queries @ documents.T / temperature).log_softmax(-1)
    return F.kl_div(found, wanted, reduction="batchmean", log_target=True)


def ranking_loss(first: Tensor, second: Tensor, scores: Tensor, *, temperature: float) -> Tensor:
    """CoSENT: log(1 + the sum of exp((cosine of i - cosine of j) / temperature) over all pairs i of
    lower score than j). The cosines come into the scores' order, whatever their scale.

    first, second [N, D]; scores [N].
    """
    cosines = (first * second).sum(-1) / temperature
    wrong = (cosines[:, None] - cosines[None, :]).masked_fill(
        scores[:, None] >= scores[None, :], -torch.inf
    )
    return torch.cat([wrong.new_zeros(1), wrong.flatten()]).logsumexp(0)


def distillation_loss(vectors: Tensor, teacher: Tensor) -> Tensor:
    """Mean cosine distance to the teacher's (projected) vectors; both [N, D]."""
    return (1 - (vectors * teacher).sum(-1)).mean()
