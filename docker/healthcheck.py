"""Exit status 0 when the server in this container is ready to serve, else 1.

It ends by itself after a few seconds, for not every container engine ends a check that hangs, and
asks without urllib, which would send the request to a proxy that the environment names.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import sys

TIMEOUT_S = 4.0
"""Below the image's own limit on a check, so that this message is seen, not a kill."""


def main() -> int:
    given = os.environ.get("NV_EMBED_PORT", "")
    port = int(given) if given.isdigit() else 8000  # Kubernetes may have put an address there
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        with contextlib.closing(connection):
            connection.request("GET", "/readyz")
            response = connection.getresponse()
            print(response.status, response.read().decode())
    except (OSError, http.client.HTTPException) as error:
        print(f"127.0.0.1:{port} does not answer: {error!r}")
        return 1
    return 0 if response.status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
