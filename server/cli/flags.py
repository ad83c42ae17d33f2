"""Options as flags of a command: one for each field of its settings."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from pydantic.fields import FieldInfo

from model.families import known_families
from server.configuration import choices_of, flag_of, is_list
from server.settings import ENV_PREFIX, HIDDEN, EncodeSettings, MachineSettings, Settings

if TYPE_CHECKING:
    from model.hub import ModelSource


def add_flags(
    parser: argparse._ActionsContainer,
    kind: type[MachineSettings] = Settings,
    *,
    leave_out: str = "",
) -> None:
    """One flag per field of `kind`, but `leave_out`. Values stay text: configuration reads them."""
    for name, field in kind.model_fields.items():
        if name == leave_out:
            continue
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif is_list(field):
            options |= {"action": "append", "metavar": name.upper()}
        else:
            options["metavar"] = f"{{{','.join(choices_of(field))}}}" if choices_of(field) else None
            options["metavar"] = options["metavar"] or name.upper()
        options["help"] = argparse.SUPPRESS if name in HIDDEN else _help(name, field)
        flags = [flag_of(name)]
        if name == "devices" and issubclass(kind, EncodeSettings):
            flags.append("--device")
        elif name == "devices":  # the other commands run on one
            flags, options["metavar"] = ["--device"], "DEVICE"
            options["help"] = f"auto, cpu, cuda or cuda:N (default: auto) [{ENV_PREFIX}DEVICES]"
        parser.add_argument(*flags, **options)
    parser.add_argument(
        "--config",
        dest="config",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="YAML, JSON or TOML file of the server's options (model: NAME, port: N) "
        f"[{ENV_PREFIX}CONFIG]",
    )


def add_family(parser: argparse.ArgumentParser, told_by: str = "its id and its files") -> None:
    """Of a command that takes a model and none of the server's options."""
    parser.add_argument(
        "--family",
        choices=["auto", *known_families()],
        default="auto",
        help=f"what kind of model it is; auto: by {told_by} (default: %(default)s)",
    )


def located(arguments: argparse.Namespace) -> ModelSource:
    """The model that a command's arguments name. Raises CheckpointError, UnsupportedError."""
    from model.hub import locate

    return locate(
        arguments.model,
        revision=arguments.revision,
        offline=arguments.offline,
        family=arguments.family,
    )


def _help(name: str, field: FieldInfo) -> str:
    default = field.default
    if isinstance(default, list):
        default = ",".join(default)
    shown = f" (default: {default})" if default not in (None, "", False) else ""
    return f"{field.description}{shown} [{ENV_PREFIX}{name.upper()}]".replace("%", "%%")
