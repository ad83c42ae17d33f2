"""`nv-embed gpu-check`: parity and speed of everything on this GPU, as a report."""

from __future__ import annotations

import argparse
from pathlib import Path

from server.cli.flags import add_flags, located
from server.cli.options import settle
from server.cli.parsing import Commands
from server.errors import SettingsError
from server.settings import ModelSettings


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "gpu-check",
        help="prove parity and measure on this GPU, and write a report",
        description="Compare every precision with float32 on this GPU, time the model, its parts "
        "and a real server, and write a JSON report, which also holds what failed. Below ten "
        "minutes on an H100. Exit status 1 when something is outside tolerance or failed.",
        epilog="Example: nv-embed gpu-check --model nvidia/NV-Embed-v2",
    )
    add_flags(parser, ModelSettings)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="below two minutes: one length of texts, without int8 and the server",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/gpu-check"),
        metavar="FOLDER",
        help="where the report goes (default: %(default)s)",
    )
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Exit status as `model.verify.gpu_check.run`. Raises SettingsError and ModelError."""
    arguments.device = settle(arguments, ModelSettings).one_device()
    if arguments.quantization != "none":
        raise SettingsError("--quantization: gpu-check tries all of them; leave it out")
    if arguments.dtype != "auto":
        raise SettingsError("--dtype: gpu-check tries all of them; leave it out")
    if arguments.fused_kernels != "plain":
        raise SettingsError("--fused-kernels: gpu-check tries all of them; leave it out")
    if arguments.device == "cpu":
        raise SettingsError("--device: gpu-check is for GPUs; `nv-embed verify` runs on a CPU")
    from model.verify import gpu_check, plan

    device = "cuda" if arguments.device == "auto" else arguments.device
    options = gpu_check.Options(
        located(arguments),
        device,
        arguments.attention,
        arguments.out,
        plan.QUICK if arguments.quick else plan.WHOLE,
        server="server.cli.gpu_check_server:serving",
    )
    return gpu_check.run(options)
