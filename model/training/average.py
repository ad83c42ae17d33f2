"""The mean of several checkpoints of one run of stages (a "soup", Wortsman et al. 2022).

    python -m model.training.average OUT CHECKPOINT CHECKPOINT …

Each stage gains on its own data and loses a little elsewhere; their mean keeps most of both. All
must have the same sizes and descend from one another.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from model import console
from model.config import ModelConfig
from model.errors import CheckpointError
from model.training.export import export_like, write_papers
from model.training.network import load_trained


def _sizes(config: ModelConfig) -> ModelConfig:
    return replace(config, matryoshka_dimensions=())


@torch.no_grad()
def average(folders: Sequence[Path], out: Path, family: str = "auto") -> Path:
    """Write the mean, fp16, in the layout of the first. Its Matryoshka dimensions are those that
    all were trained for. Raises CheckpointError."""
    device = torch.device("cpu")
    first = load_trained(folders[0], device=device, family=family)
    total = dict(first.named_parameters())
    widths = first.config.matryoshka_dimensions
    for folder in folders[1:]:
        other = load_trained(folder, device=device, family=family)
        widths = tuple(w for w in widths if w in other.config.matryoshka_dimensions)
        if _sizes(other.config) != _sizes(first.config):
            raise CheckpointError(f"{folder} is of another size or name than {folders[0]}")
        for name, parameter in other.named_parameters():
            total[name].add_(parameter)
    for parameter in total.values():
        parameter.div_(len(folders))
    first.config = replace(first.config, matryoshka_dimensions=widths)
    export_like(folders[0], first, out)
    write_papers(folders[0], out, f"The mean of {len(folders)} checkpoints.")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="Average checkpoints.")
    parser.add_argument("out", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--family", default="auto", help="where their files do not tell it")
    arguments = parser.parse_args()
    print(average(arguments.checkpoints, arguments.out, arguments.family))


if __name__ == "__main__":
    sys.exit(console.run("average", main))
