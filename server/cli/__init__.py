"""The command `nv-embed`: a file for each of its commands, and what they have in common.

Owns words: which options a command has, what they are called and how they are explained. A command
has `add`, which describes it to the parser, and `run`, which settles the options and calls whoever
does the work. What that needs is imported there: `--help` loads neither a web server nor torch.
"""

from server.cli.command_line import main

__all__ = ["main"]
