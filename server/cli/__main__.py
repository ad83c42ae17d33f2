"""`python -m server.cli`: the same as `nv-embed`."""

import sys

from server.cli import main

if __name__ == "__main__":
    sys.exit(main())
