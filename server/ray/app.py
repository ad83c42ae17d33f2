"""`serve run server.ray.app:app model=…`: the application that Ray Serve deploys.

The one file that imports Ray.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

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


def app(args: dict[str, Any]) -> Application:
    """Builder: args are the server's options by name, and those of ReplicaSettings.

    Raises SettingsError for an unknown one, a wrong value, or what Ray does itself.
    """
    settings = read(args, os.environ)
    deployment = serve.deployment(serve.ingress()(Replica))
    instruments = Instruments(metrics.Counter, metrics.Gauge)
    return deployment.options(name=NAME, **settings.options()).bind(args, instruments)
