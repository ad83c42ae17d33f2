"""`serve run server.ray.app:app model=…`: the application that Ray Serve deploys.

Ray is imported here and in server/ray/actors.py alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp

from model.extras import how_to_install
from server.errors import SettingsError
from server.ray.metrics import Instruments
from server.ray.replica import Replica
from server.ray.settings import read

try:
    from ray import serve
    from ray.serve import metrics  # those of ray.util, which say of which replica they are
except ImportError as error:
    raise SettingsError(f"Ray Serve is not installed: {how_to_install('ray')}") from error

if TYPE_CHECKING:
    from ray.serve import Application

NAME = "nv-embed"
"""Of the deployment, as in Serve's config file and metrics."""


class Deployment:
    """The methods that Serve looks for. It listens, routes, asks for health, and ends a replica."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it, and sends no request before
        self, args: Mapping[str, Any], instruments: Instruments
    ) -> None:
        self._replica = await Replica.started(args, instruments)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Of `ingress` without an app, which could not know the engine."""
        return self._replica.app

    def check_health(self) -> None:
        """Asked now and then: a replica for which it raises three times in a row is replaced."""
        self._replica.check_health()

    async def __del__(self) -> None:
        """Awaited when nobody routes here any more and all requests have their answers."""
        if hasattr(self, "_replica"):  # else its start has failed
            await self._replica.stop()


def app(args: dict[str, Any]) -> Application:
    """Builder: args are the server's options by name, and those of ReplicaSettings.

    Raises SettingsError for an unknown one, a wrong value, or what Ray does itself.
    """
    settings = read(args, os.environ)
    deployment = serve.deployment(serve.ingress()(Deployment))
    instruments = Instruments(metrics.Counter, metrics.Gauge)
    return deployment.options(name=NAME, **settings.options()).bind(args, instruments)
