"""The one way from a dialect's body to vectors, and what every answer says of them.

A dialect reads its fields and writes its answer; here they become a job, and the job a result. The
headers tell which side it was, which inputs were cut, and which vectors these are. Knows no body.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator, Sequence
from itertools import groupby

from fastapi import Request

from model.batch import RunnerInfo
from model.families import Side
from model.fingerprint import kind_of_vectors, of_vectors
from server.api.answers import TIMING_HEADER, timing
from server.api.body import hold
from server.api.disconnects import cancelled_on_disconnect
from server.api.encoding_options import USUAL_FIELDS, Reading, encoding_options, inputs_of
from server.api.instructions import Defaults
from server.api.names import ServedNames
from server.api.request_context import context_of
from server.api.schemas import InstructedInput
from server.api.vector_format import VectorFormat
from server.engine.interface import (
    EmbedJob,
    EmbedResult,
    EncodingOptions,
    Engine,
    PromptedText,
)
from server.errors import InvalidRequestError, OtherVectorsError
from server.settings import Settings

SIDE_HEADER = "x-nv-embed-input-type"
CUT_HEADER = "x-nv-embed-truncated"
FINGERPRINT_HEADER = "x-nv-embed-fingerprint"
HEADERS = (SIDE_HEADER, CUT_HEADER, FINGERPRINT_HEADER, TIMING_HEADER)
_WANTED = FINGERPRINT_HEADER.encode()
_BASE64_BYTES = 4 + 6  # of one value: in memory, and in the answer
_FLOAT_BYTES = 4 + 13


class Embedding:
    """Of one engine, for all its dialects."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        """Raises SettingsError."""
        self.engine = engine
        self.names = ServedNames(engine.source.model_id, settings.served_model_name)
        self.defaults = Defaults.of(
            settings.query_instruction,
            settings.default_input_type,
            engine.family,
            engine.prompts,
        )
        self._truncates_dimensions = settings.allow_truncated_dimensions
        self._reading = Reading.of(settings, engine.family)
        self._usual_options = functools.lru_cache(maxsize=256)(self._options_of_type)
        self._runners: list[RunnerInfo] = []
        self._fingerprints: dict[int, str] = {}  # of those runners, by dimensions

    def job(
        self,
        request: Request,
        wire: InstructedInput,
        model: str | None = None,
        deadline: float = float("inf"),
        side: Side | None = None,
        name: str = "input",
    ) -> EmbedJob:
        """side: whatever the request says. name: of the field that the inputs came in.

        Raises InvalidRequestError, ModelNotFoundError.
        """
        path_side = side or context_of(request.scope).side
        if wire.model_fields_set <= USUAL_FIELDS:
            options = self._usual_options(wire.input_type, model, path_side)
        else:
            options = encoding_options(wire, model, self.names, self.defaults, path_side)
        inputs, prompted = inputs_of(wire, options.side, self._reading, name)
        return EmbedJob(inputs, options, deadline, prompted)

    def _options_of_type(
        self, input_type: str | None, model: str | None, path_side: Side | None
    ) -> EncodingOptions:
        """Of a request that says no more of its texts, as most do."""
        wire = InstructedInput(input="", input_type=input_type)
        return encoding_options(wire, model, self.names, self.defaults, path_side)

    def pairs_job(
        self,
        wire: InstructedInput,
        queries: Sequence[str],
        passages: Sequence[str],
        model: str | None,
        deadline: float,
    ) -> EmbedJob:
        """Queries, then passages, in one job; `wire` describes the queries' task.

        Raises InvalidRequestError, ModelNotFoundError.
        """
        of_query = encoding_options(wire, model, self.names, self.defaults, "query")
        bare = wire.model_copy(update={"instruction": None, "task": None})
        options = encoding_options(bare, model, self.names, self.defaults, "passage")
        asked = [PromptedText(of_query.prompt, text) for text in queries]
        return EmbedJob([*asked, *passages], options, deadline, len(asked))

    async def embed(
        self, request: Request, job: EmbedJob, how: VectorFormat, name: str = "input"
    ) -> tuple[EmbedResult, dict[str, str]]:
        """The vectors, and headers for their answer. name: of the field that the inputs came in.

        Raises ServerErrors, ClientDisconnect.
        """
        width = self.engine.dimensions
        self.check(how)
        fingerprint = self.fingerprint(how.dimensions or width)
        self._refuse_others(request, fingerprint)
        size = width * (_BASE64_BYTES if how.base64 else _FLOAT_BYTES)
        hold(request, len(job.inputs) * size)
        try:
            with cancelled_on_disconnect(request):
                result = await self.engine.embed(job, context_of(request.scope).key_name)
            if (times := context_of(request.scope).times) is not None:
                times.add(result.stages, how)
            if job.options.chunks is not None:
                hold(request, (len(result.vectors) - 1) * size)
            how.check_vectors(result.vectors)
        except InvalidRequestError as error:
            raise _renamed(error, name) from None
        context_of(request.scope).log.update(inputs=len(job.inputs), tokens=result.tokens)
        headers = {SIDE_HEADER: side_of(job), FINGERPRINT_HEADER: fingerprint}
        headers[TIMING_HEADER] = timing(result.stages)
        if result.cut:
            headers[CUT_HEADER] = ranges(result.cut)
        return result, headers

    def check(self, how: VectorFormat) -> None:
        """Raises InvalidRequestError for what this model cannot give."""
        engine = self.engine
        how.check(engine.dimensions, self._truncates_dimensions, engine.matryoshka_dimensions)

    def fingerprint(self, dimensions: int) -> str:
        """Of vectors cut to so many dimensions; "" while no worker says how it computes."""
        engine, runners = self.engine, self.engine.runners
        if runners != self._runners:
            self._runners, self._fingerprints = runners, {}
        if dimensions not in self._fingerprints and runners:
            kinds = {kind_of_vectors(runner.dtype, runner.quantization) for runner in runners}
            kind = ", ".join(sorted(kinds))
            found = of_vectors(engine.fingerprint, engine.family, dimensions, kind)
            self._fingerprints[dimensions] = found
        return self._fingerprints.get(dimensions, "")

    def _refuse_others(self, request: Request, fingerprint: str) -> None:
        wanted = context_of(request.scope).headers.get(_WANTED)
        if wanted is not None and wanted.decode("latin-1") != fingerprint:
            raise OtherVectorsError(
                f"{FINGERPRINT_HEADER} asks for other vectors than this server's {fingerprint}: "
                "another model, precision or number of dimensions made yours"
            )


def side_of(job: EmbedJob) -> str:
    """query, passage or none; mixed where only some of the texts bring an instruction."""
    asked = job.options.side or "none"
    if not job.prompted or asked == "query":
        return asked
    return "query" if job.prompted == len(job.inputs) else "mixed"


def salt_of(text: str | None) -> bytes:
    """Of a `cache_salt`, of one length, so that no salt and key together are another's."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest() if text else b""


def _renamed(error: InvalidRequestError, name: str) -> InvalidRequestError:
    """What is said of `input`, of the dialect's own field."""
    if name != "input":
        if error.param is not None:
            error.param = re.sub(r"^input\b", name, error.param)
        error.message = re.sub(r"\binput(?=\[\d+\]|\))", name, error.message)
    return error


def ranges(indices: Sequence[int]) -> str:
    """0,1,2,5 as 0-2,5."""
    return ",".join(_runs(indices))


def _runs(indices: Sequence[int]) -> Iterator[str]:
    for _, group in groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        run = [index for _, index in group]
        yield f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}"
