"""The first lines of a worker process: load it, or say in one line why that cannot be.

Imports nothing at its top, for even numpy fails where memory or processes are short, with a page of
advice on how to install it.
"""

from __future__ import annotations

import sys

_NOT_LOADED = 71


def main(fd: int) -> int:
    """A worker's whole life; returns the exit status."""
    try:
        from server.engine import worker
    except (ImportError, OSError, MemoryError) as error:
        root: BaseException = error
        while cause := root.__cause__ or root.__context__:
            root = cause
        line = next(iter(f"{root}".splitlines()), "")
        print(f"the worker cannot be loaded: {line or repr(root)}", file=sys.stderr)
        return _NOT_LOADED
    return worker.main(fd)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
