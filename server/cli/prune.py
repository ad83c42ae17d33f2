"""`nv-embed prune`: a smaller checkpoint out of a larger one."""

from __future__ import annotations

import argparse
from pathlib import Path

from server.cli.flags import add_family, add_flags
from server.cli.options import settle
from server.cli.parsing import Commands, whole_number
from server.settings import MachineSettings


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "prune",
        help="leave out layers, heads and neurons of a model",
        description="Write a checkpoint with fewer layers, kv heads (with their query heads) or "
        "MLP neurons: those stay that move the hidden states of the given texts most. The vectors "
        "keep their width and axes. What it lost is won back by distillation: "
        "model/training/README.md has the commands.",
        epilog="Example: nv-embed prune my-embed -o smaller --texts texts.jsonl --layers 4",
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or cached hub id")
    parser.add_argument("-o", "--out", type=Path, required=True, help="a new folder")
    parser.add_argument(
        "--texts", type=Path, required=True, help="JSON lines of texts, such as will be embedded"
    )
    parser.add_argument(
        "--last-text",
        type=whole_number(1),
        default=2000,
        help="use the first so many texts (default: %(default)s)",
    )
    parser.add_argument("--layers", type=whole_number(1), help="layers that stay (default: all)")
    parser.add_argument("--kv-heads", type=whole_number(1), help="kv heads that stay in each layer")
    parser.add_argument(
        "--intermediate-size", type=whole_number(1), help="MLP neurons that stay in each layer"
    )
    parser.add_argument(
        "--max-tokens",
        type=whole_number(3, 32_768),
        default=192,
        help="of a text, at most (default: %(default)s)",
    )
    add_family(parser, told_by="its files")
    add_flags(parser, MachineSettings)
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    device = settle(arguments, MachineSettings).one_device()
    sizes = (arguments.layers, arguments.kv_heads, arguments.intermediate_size)
    import torch

    from model.hub import locate
    from model.runner import resolve_device
    from model.training.examples import read_texts
    from model.training.pruning import Sizes, prune

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    source = locate(arguments.model, offline=True, family=arguments.family)
    texts = read_texts(arguments.texts)[: arguments.last_text]
    kept, cosine = prune(
        source.path,
        arguments.out,
        texts,
        Sizes(*sizes),
        family=source.family,
        max_tokens=arguments.max_tokens,
        device=resolve_device(device),
    )
    print(f"layers that stay: {', '.join(map(str, kept.layers))}")
    print(f"mean cosine of {len(texts)} vectors to those of before: {cosine:.4f}")
    print(f"pruned: {arguments.out}")
    return 0
