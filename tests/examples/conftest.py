"""Collected for `make test-examples` alone, which names the folder of its environments."""

import os

collect_ignore_glob = [] if "EXAMPLE_ENVIRONMENTS" in os.environ else ["test_*.py"]
