"""The arguments of an application of Ray Serve: the server's options, and how many replicas.

Owns what is refused of them because Ray does it. Imports nothing of Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from model.errors import did_you_mean
from server import configuration
from server.errors import SettingsError
from server.settings import Settings

_LISTENS = "Ray listens: set it in http_options of Serve's config file"
_CONNECTIONS = "Ray's proxies hold the connections, and have time limits of their own"
RAYS_OWN = {
    **dict.fromkeys(("host", "port", "tls_certificate", "tls_key"), _LISTENS),
    "uds": "Ray listens, and on no Unix socket",
    "root_path": "Ray does that: route_prefix of the application",
    **dict.fromkeys(
        ("max_connections", "header_timeout", "body_timeout", "write_timeout"), _CONNECTIONS
    ),
    "max_connection_age": _CONNECTIONS,
    "drain_delay": "Ray's proxies leave a replica before it is told to stop",
    "api_key": "Ray shows arguments to all who ask for its configuration: use api_key_file",
}
"""Options that have no meaning here -> what to do instead. In the environment and in a file, which
a plain server may share, they are passed over."""
_WAIT_S = 10.0
"""How much longer than --drain-timeout Ray waits for a replica before it kills it."""


class ReplicaSettings(Settings):
    """What the server's options leave open. The names are Ray's own where Ray has one."""

    min_replicas: int = Field(1, ge=1, description="replicas at least")
    max_replicas: int | None = Field(
        None, ge=1, description="replicas at most, as many as load asks for; default: min_replicas"
    )
    target_ongoing_requests: float = Field(
        64.0, gt=0, description="requests in a replica, waiting or computed, that are wanted of it"
    )
    max_ongoing_requests: int = Field(
        512,
        ge=1,
        description="requests that a proxy hands to a replica at once; Ray's own default of 5 "
        "would leave the batches empty",
    )
    upscale_delay_s: float = Field(30.0, ge=0, description="seconds of load before a new replica")
    downscale_delay_s: float = Field(
        600.0, ge=0, description="seconds without load before a replica ends"
    )
    num_cpus: float = Field(2.0, gt=0, description="cores that Ray sets aside for a replica")
    num_gpus: float | None = Field(
        None, ge=0, le=1, description="GPUs of a replica; default: 1, with devices=cpu 0"
    )
    health_check_period_s: float = Field(
        10.0, gt=0, description="seconds between two checks; after three in vain it is replaced"
    )
    health_check_timeout_s: float = Field(30.0, gt=0, description="seconds that a check may take")

    @model_validator(mode="after")
    def _one_worker(self) -> Self:
        """A replica is a front with one engine worker."""
        if len(self.devices) > 1 or self.devices[0] not in ("auto", "cpu", "cuda", "cuda:0"):
            raise ValueError(
                f"devices={','.join(self.devices)}: a replica has one worker, and Ray chooses its "
                "GPU: say auto, cpu or cuda, and ask for more replicas"
            )
        (device,) = self.devices
        if device == "cpu" and self.num_gpus:
            raise ValueError("num_gpus is set, and devices=cpu would not use it")
        if device.startswith("cuda") and not self.gpus:
            raise ValueError(f"devices={device} with num_gpus=0: Ray hides all GPUs")
        return self

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas={self.max_replicas} is less than min_replicas={self.min_replicas}"
            )
        if self.target_ongoing_requests > self.max_ongoing_requests:
            raise ValueError(
                f"target_ongoing_requests={self.target_ongoing_requests:g} is more than "
                f"max_ongoing_requests={self.max_ongoing_requests}: it would never be reached"
            )
        return self

    @property
    def gpus(self) -> float:
        """Of a replica."""
        if self.num_gpus is None:
            return 0.0 if self.devices == ["cpu"] else 1.0
        return self.num_gpus

    def options(self) -> dict[str, Any]:
        """Those of the deployment, in Ray's words."""
        scale: dict[str, Any] = {"num_replicas": self.min_replicas}
        if self.max_replicas not in (None, self.min_replicas):
            names = [*("min_replicas", "max_replicas", "target_ongoing_requests")]
            names += ["upscale_delay_s", "downscale_delay_s"]
            scale = {"autoscaling_config": {name: getattr(self, name) for name in names}}
        return {
            **scale,
            "max_ongoing_requests": self.max_ongoing_requests,
            "graceful_shutdown_timeout_s": self.drain_timeout + _WAIT_S,
            "health_check_period_s": self.health_check_period_s,
            "health_check_timeout_s": self.health_check_timeout_s,
            "logging_config": {"enable_access_log": False},  # the server has its own
            "ray_actor_options": {"num_cpus": self.num_cpus, "num_gpus": self.gpus},
        }


def read(args: Mapping[str, Any], environment: Mapping[str, str]) -> ReplicaSettings:
    """Arguments over environment over the file that `config` names. Raises SettingsError."""
    given: dict[str, Any] = {}
    known = ReplicaSettings.model_fields.keys() - RAYS_OWN.keys()
    for said, value in args.items():
        name = str(said).replace("-", "_")
        if name in RAYS_OWN:
            raise SettingsError(f"{said}: {RAYS_OWN[name]}")
        if name not in known and name != "config":
            raise SettingsError(f"unknown argument {said!r}{did_you_mean(name, sorted(known))}")
        if name in given:
            raise SettingsError(f"{said} stands there twice")
        given[name] = value
    settings = configuration.load_as(ReplicaSettings, given, environment, named=str)
    passed_over = RAYS_OWN.keys() - {"api_key"}
    own: dict[str, Any] = {name: ReplicaSettings.model_fields[name].default for name in passed_over}
    if settings.threads is None and not settings.gpus:  # Ray tells nobody how many cores are whose
        own["threads"] = max(1, int(settings.num_cpus))
    return settings.model_copy(update=own)
