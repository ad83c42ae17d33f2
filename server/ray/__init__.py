"""The server on Ray: Serve's replicas, and the actors of `encode`. Docs: docs/ray.md."""

from __future__ import annotations
