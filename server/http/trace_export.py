"""OpenTelemetry's SDK: which requests are sampled, and how finished spans leave.

Spans wait in the SDK's bounded queue for its thread; a collector that is gone costs spans and one
line of the log, never a request. Knows no request.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Sequence
from importlib.metadata import version
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio, Sampler
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from server.errors import SettingsError

logger = logging.getLogger("nv_embed.traces")

_RATIO = 0.01
"""Of the traces that begin here. All of them would cost the front a third of what it can do."""
_EXPORTER_LOG = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
_QUEUE_LOG = "opentelemetry.sdk._shared_internal"
_FLUSH_S = 2.0
_GIVE_UP_S = 0.5


class TraceExport:
    """Made at the start, closed when all is answered."""

    def __init__(self, url: str, ratio: float | None) -> None:
        """ratio: of --trace-sample; None: as OTEL_TRACES_SAMPLER says, else 1 % of the traces that
        begin here. Raises SettingsError for variables that the SDK does not take."""
        variable, sampler = os.environ.get("OTEL_TRACES_SAMPLER"), None
        if ratio is None and not variable:
            ratio = _RATIO
        if ratio is not None:
            sampler = ParentBasedTraceIdRatio(ratio)
        try:
            provider = TracerProvider(sampler, _resource(), shutdown_on_exit=False)
            self._exporter = _QuietExporter(OTLPSpanExporter(endpoint=url), url)
            self._processor = BatchSpanProcessor(self._exporter)
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            raise SettingsError(f"OpenTelemetry's variables (OTEL_...): {error}") from None
        self.sampler: Sampler = provider.sampler
        self.resource = provider.resource
        self.scope = InstrumentationScope("nv_embed", version("nv-embed-server"))
        share = f"OTEL_TRACES_SAMPLER={variable}" if ratio is None else f"{ratio:g} of them"
        logger.info("traces go to %s: %s", _place(url), share)

    def send(self, spans: Sequence[ReadableSpan]) -> None:
        """Queue them; the oldest that wait are dropped when there are too many."""
        for span in spans:
            self._processor.on_end(span)

    def _shut_down(self) -> None:
        self._processor.shutdown()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Send what waits, for two seconds at most: the SDK alone would try for half a minute."""
        ending = threading.Thread(target=self._shut_down, name="traces-end", daemon=True)
        ending.start()
        ending.join(_FLUSH_S)
        if ending.is_alive():
            self._exporter.give_up()
            ending.join(_GIVE_UP_S)
            logger.warning("the last traces were not taken")


class _QuietExporter(SpanExporter):
    """One line when the collector stops taking spans, one when it takes them again. The SDK would
    write several for each batch."""

    def __init__(self, exporter: OTLPSpanExporter, url: str) -> None:
        self._exporter, self._place = exporter, _place(url)
        self._failing = self._given_up = False
        self._notes = _Notes()
        theirs = logging.getLogger(_EXPORTER_LOG)
        theirs.addHandler(self._notes)
        theirs.propagate = False
        logging.getLogger(_QUEUE_LOG).addFilter(lambda _: not self._failing)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._notes.status = ""
        result = self._exporter.export(spans)
        failed = result is not SpanExportResult.SUCCESS
        if failed and not self._failing and not self._given_up:
            status = self._notes.status
            why = f"it answers {status}" if status else "it does not answer"
            logger.warning(
                "traces are lost, for %s does not take them: %s; said once, until it does",
                self._place,
                why,
            )
        elif self._failing and not failed:
            logger.info("%s takes traces again", self._place)
        self._failing = failed and not self._given_up
        return result

    def give_up(self) -> None:
        """End a try that is under way."""
        self._given_up, self._failing = True, False
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def shutdown(self) -> None:
        if not self._given_up:
            self.give_up()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return True


class _Notes(logging.Handler):
    """In place of the exporter's lines, which quote whole addresses: what the collector last
    answered, if it did."""

    status = ""

    def emit(self, record: logging.LogRecord) -> None:
        found = re.search(r"code: (\d{3})\b", record.getMessage())
        self.status = found[1] if found else self.status


def _resource() -> Resource:
    """OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES and what the SDK finds out."""
    found = Resource.create()
    attributes = dict(found.attributes)
    attributes.setdefault("service.version", version("nv-embed-server"))
    if str(attributes["service.name"]).startswith("unknown_service"):
        attributes["service.name"] = "nv-embed-server"
    return Resource(attributes, found.schema_url)


def _place(url: str) -> str:
    """Without what may be secret in it."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
