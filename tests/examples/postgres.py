"""A Postgres with pgvector in a folder, until stdin ends: prints its address. Run by an environment
that has pgserver, whose wheel holds both."""

import sys
import warnings

warnings.simplefilter("ignore")  # platformdirs, of a missing XDG_RUNTIME_DIR
import pgserver  # noqa: E402

server = pgserver.get_server(sys.argv[1], cleanup_mode="stop")
print(server.get_uri(), flush=True)
sys.stdin.read()
server.cleanup()
