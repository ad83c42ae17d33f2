"""ASGI layer that makes a trace of a request: a SERVER span, and one for each of its stages.

Only there when traces are wanted. A request that is not sampled costs its trace id; the spans of
one that is are made from timestamps when it has ended. They hold counts, names of routes and of
the model, never a text, a key or a path that a client made up.
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Mapping
from http import HTTPStatus
from itertools import accumulate, pairwise

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.sampling import Decision, SamplingResult
from opentelemetry.trace import (
    INVALID_SPAN_CONTEXT,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)
from opentelemetry.util.types import AttributeValue
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.openapi import OPEN_PATHS
from server.api.request_context import RequestContext, StageTimes, context_of
from server.api.vector_format import VectorFormat
from server.http.request_record import CLIENT_CLOSED_REQUEST, LABELS
from server.http.trace_export import TraceExport

STAGES = ("tokenize", "queue", "forward")
WRITE = "write"
_OPERATIONS = {path: label for path, label in LABELS.items() if label in ("embeddings", "rerank")}
"""Route -> `gen_ai.operation.name`, of what is posted there."""
_COUNTS = {"inputs": "nv_embed.inputs", "tokens": "gen_ai.usage.input_tokens"}
"""Name in the log line -> attribute."""
_METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "HEAD", "TRACE"})
_FLAGS = TraceFlags(TraceFlags.SAMPLED)
_FAILED = Status(StatusCode.ERROR)
_FINE = Status(StatusCode.UNSET)
_TRACEPARENT = re.compile(
    rb"[ \t]*([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?[ \t]*"
)
logging.getLogger("opentelemetry.trace.span").setLevel(logging.ERROR)  # it quotes a tracestate
_MOST_BYTES = 512
"""Of each of the two headers."""
_ids = random.Random()  # noqa: S311  (no secrets, only unlike each other)
Attributes = dict[str, AttributeValue]


class _Answer:
    """What is seen of an answer on its way out."""

    __slots__ = ("_pieces", "_send", "_written", "head", "status")

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = self._pieces = 0
        self.head = self._written = 0.0
        """When its head came by, on time.monotonic's clock."""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.head = message["status"], time.monotonic()
        elif message.get("body"):
            self._pieces += 1
            self._written = time.monotonic()
        await self._send(message)

    @property
    def written(self) -> float:
        """When its last byte was made: one that comes in pieces is written while it is sent."""
        return self._written if self._pieces > 1 else self.head


class Tracing:
    """Within the layer that makes the RequestContext, around all others."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        export: TraceExport,
        model: str,
        dimensions: int,
        paths: frozenset[str],
    ) -> None:
        """model: the name that is shown to clients. paths: of the routes without parameters."""
        self._app, self._export, self._paths = app, export, paths
        self._model, self._dimensions = model, dimensions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or context_of(scope).route_path in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        context = context_of(scope)
        parent, around = _parent(scope, context.headers), Context()
        if parent.is_valid:
            trace_id = parent.trace_id
            around = set_span_in_context(NonRecordingSpan(parent), around)
        else:
            trace_id = _ids.getrandbits(128)
        context.log["trace_id"] = f"{trace_id:032x}"
        sampled = self._export.sampler.should_sample(
            around, trace_id, scope["method"], SpanKind.SERVER
        )
        if sampled.decision is not Decision.RECORD_AND_SAMPLE:
            await self._app(scope, receive, send)
            return
        context.times, answer = StageTimes(), _Answer(send)
        trace = _Trace(self._export, trace_id, parent, sampled)
        try:
            await self._app(scope, receive, answer.send)
        finally:
            ended = time.monotonic()
            spans = [self._server_span(trace, scope, context, answer, ended)]
            spans += _stage_spans(trace, context.times, answer.written or ended)
            self._export.send(spans)

    def _server_span(
        self, trace: _Trace, scope: Scope, context: RequestContext, answer: _Answer, ended: float
    ) -> ReadableSpan:
        method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        status = answer.status or CLIENT_CLOSED_REQUEST
        attributes: Attributes = {
            "http.request.method": method,
            "http.response.status_code": status,
            "url.scheme": scope["scheme"],
            "network.protocol.version": scope["http_version"],
        }
        if status >= HTTPStatus.BAD_REQUEST:
            attributes["error.type"] = str(status)
        route = self._route(scope, context)
        name = f"{method} {route}" if route else method
        if route:
            attributes["http.route"] = route
            if "{" not in route:  # else a client's words stand in it
                attributes["url.path"] = route
        for key in ("inputs", "tokens"):
            if key in context.log:
                attributes[_COUNTS[key]] = context.log[key]
        operation = _OPERATIONS.get(route) if method == "POST" else None
        if operation is not None:
            name = f"{operation} {self._model}"
            attributes["gen_ai.operation.name"] = operation
            attributes["gen_ai.provider.name"] = "nv_embed"
            attributes["gen_ai.request.model"] = self._model
        how = context.times.how if context.times is not None else None
        if operation == "embeddings" and how is not None:
            attributes["gen_ai.request.encoding_formats"] = (_encoding(how),)
            attributes["gen_ai.embeddings.dimension.count"] = how.dimensions or self._dimensions
        failed = status >= HTTPStatus.INTERNAL_SERVER_ERROR
        return trace.server_span(name, ended, attributes, _FAILED if failed else _FINE)

    def _route(self, scope: Scope, context: RequestContext) -> str:
        """As the server writes it; "" for a path that is none of its own. What was refused before
        it was routed has only its path."""
        if "route" in scope:
            return str(scope["route"].path)
        return context.route_path if context.route_path in self._paths else ""


class _Trace:
    """Of one sampled request: what its spans hang on, and what its clock says."""

    def __init__(
        self, export: TraceExport, trace_id: int, parent: SpanContext, sampled: SamplingResult
    ) -> None:
        self._export, self._sampled = export, sampled
        self._parent = parent if parent.is_valid else None
        self._server = self._context(trace_id)
        self._began, self._began_ns = time.monotonic(), time.time_ns()

    def _context(self, trace_id: int) -> SpanContext:
        state = self._sampled.trace_state
        return SpanContext(trace_id, _ids.getrandbits(64), False, _FLAGS, state)

    def _ns(self, moment: float) -> int:
        """Of time.monotonic's clock -> nanoseconds since 1970."""
        return self._began_ns + int((moment - self._began) * 1e9)

    def server_span(
        self, name: str, ended: float, attributes: Attributes, status: Status
    ) -> ReadableSpan:
        """From the beginning of this trace."""
        return ReadableSpan(
            name,
            self._server,
            self._parent,
            self._export.resource,
            attributes | dict(self._sampled.attributes or {}),
            kind=SpanKind.SERVER,
            status=status,
            start_time=self._began_ns,
            end_time=self._ns(ended),
            instrumentation_scope=self._export.scope,
        )

    def stage_span(self, name: str, began: float, ended: float) -> ReadableSpan:
        """Within the request's."""
        return ReadableSpan(
            name,
            self._context(self._server.trace_id),
            self._server,
            self._export.resource,
            start_time=self._ns(began),
            end_time=self._ns(ended),
            instrumentation_scope=self._export.scope,
        )


def _stage_spans(trace: _Trace, times: StageTimes | None, written: float) -> list[ReadableSpan]:
    """End to end, up to when the last of the answer was written. What comes before, reading the
    body, and behind, sending, is the request's own."""
    if times is None or not times.seconds:
        return []
    began = times.ended - sum(times.seconds)
    moments = [*accumulate(times.seconds, initial=began), max(times.ended, written)]
    names = (*STAGES[: len(times.seconds)], WRITE)
    return [
        trace.stage_span(name, *span) for name, span in zip(names, pairwise(moments), strict=True)
    ]


def _parent(scope: Scope, headers: Mapping[bytes, bytes]) -> SpanContext:
    """What `traceparent` and `tracestate` say (W3C Trace Context); invalid without a right one.
    The SDK's own reader takes three times as long, and logs what is too long."""
    given = headers.get(b"traceparent")
    found = None if given is None or len(given) > _MOST_BYTES else _TRACEPARENT.fullmatch(given)
    if found is None:
        return INVALID_SPAN_CONTEXT
    version, trace_id, span_id, flags, rest = found.groups()
    if version == b"ff" or (version == b"00" and rest):
        return INVALID_SPAN_CONTEXT
    state = None
    if b"tracestate" in headers:  # several headers are one list
        states = b",".join([value for name, value in scope["headers"] if name == b"tracestate"])
        if len(states) <= _MOST_BYTES:
            state = TraceState.from_header([states.decode("latin-1")])
    return SpanContext(int(trace_id, 16), int(span_id, 16), True, TraceFlags(int(flags, 16)), state)


def _encoding(how: VectorFormat) -> str:
    if how.base64:
        return "base64"
    return "float" if how.dtype == "float32" else how.dtype
