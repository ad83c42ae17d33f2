"""Whether traces are sent, and where to: the option, or else OpenTelemetry's own variables.

Imports nothing of OpenTelemetry: without an endpoint none of it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.extras import how_to_install
from server.errors import SettingsError
from server.settings import Settings

if TYPE_CHECKING:
    from server.http.trace_export import TraceExport

_TRACES = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
_ALL = "OTEL_EXPORTER_OTLP_ENDPOINT"
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PATH = "/v1/traces"


@dataclass(frozen=True, slots=True)
class Target:
    """Where traces go."""

    url: str
    origin: str
    """The option or variable that says so."""


def target_of(settings: Settings, environment: Mapping[str, str]) -> Target | None:
    """None where nobody wants traces. Empty variables count as unset, as OpenTelemetry says.

    Raises SettingsError for a protocol that is not spoken here.
    """
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if settings.otlp_endpoint is not None:
        return Target(_with_path(settings.otlp_endpoint), "--otlp-endpoint")
    name = next((name for name in (_TRACES, _ALL) if environment.get(name)), None)
    exporters = (environment.get("OTEL_TRACES_EXPORTER") or "otlp").lower().split(",")
    if name is None or "otlp" not in [exporter.strip() for exporter in exporters]:
        return None
    for variable in _PROTOCOLS:
        if protocol := environment.get(variable):
            if protocol != "http/protobuf":
                raise SettingsError(
                    f"{variable}={protocol}: traces are sent as http/protobuf alone, which "
                    "collectors take on port 4318"
                )
            break
    url = environment[name]
    return Target(url if name == _TRACES else f"{url.removesuffix('/')}{_PATH}", name)


def export_to(target: Target, settings: Settings) -> TraceExport:
    """Raises SettingsError without the packages of the extra, and for variables that are wrong."""
    try:
        from server.http.trace_export import TraceExport
    except ImportError:
        raise SettingsError(
            f"{target.origin}: traces need packages that are not installed: "
            f"{how_to_install('otel')}"
        ) from None
    return TraceExport(target.url, settings.trace_sample)


def _with_path(endpoint: str) -> str:
    bare = endpoint.rstrip("/")
    return bare if bare.endswith(_PATH) else bare + _PATH
