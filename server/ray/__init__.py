"""The server on Ray, for those who run Ray: Serve's replicas. Docs: docs/ray.md."""

from __future__ import annotations
