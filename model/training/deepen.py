"""More layers for a checkpoint: it computes the same until it is trained further.

    python -m model.training.deepen CHECKPOINT OUT --layers 6

The new layers stand on top, copies of the last one whose projections back into the residual are
zero (stacking: Gong et al. 2019). Reads and writes files of every family; knows no module.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from model import console
from model.config import ModelConfig
from model.errors import CheckpointError
from model.files import read_json
from model.training.export import copy_beside, tell_family, write_checkpoint

_LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..*)")
_INTO_RESIDUAL = ("o_proj.weight", "down_proj.weight")


def deepen(tensors: dict[str, Tensor], before: int, layers: int) -> dict[str, Tensor]:
    """The tensors of a checkpoint with `before` layers, and those of the new ones."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(name)
        if match and int(match[2]) == before - 1:
            for layer in range(before, layers):
                zero = name.endswith(_INTO_RESIDUAL)
                copy = torch.zeros_like(tensor) if zero else tensor.clone()
                found[f"{match[1]}{layer}{match[3]}"] = copy
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Add layers to a checkpoint of one file.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, required=True, help="how many there shall be")
    parser.add_argument("--family", default="auto", help="where its files do not tell it")
    arguments = parser.parse_args()
    config = ModelConfig.from_dir(arguments.checkpoint, arguments.family)
    before = config.num_hidden_layers
    if arguments.layers < before:
        raise CheckpointError(f"{arguments.checkpoint} has {before} layers already")
    tensors = load_file(str(arguments.checkpoint / "model.safetensors"))
    raw = read_json(arguments.checkpoint / "config.json")
    section = config.family.section
    (raw if section is None else raw[section])["num_hidden_layers"] = arguments.layers
    write_checkpoint(
        arguments.out,
        deepen(tensors, before, arguments.layers),
        raw,
        arguments.checkpoint / "tokenizer.json",
    )
    copy_beside(arguments.checkpoint, arguments.out)
    tell_family(arguments.out, config)


if __name__ == "__main__":
    sys.exit(console.run("deepen", main))
