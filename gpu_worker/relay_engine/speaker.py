"""How one node is asked for an answer: detects its API, picks the way to go on with a text, reads the answer.

How a sequence that was streamed before goes on, best way first:
1. raw prompts: `/v1/completions` with the prompt and the text so far;
2. nodes known to continue (`wire.CONTINUES`): vLLM and SGLang take the text as an open assistant message, llama.cpp
   renders its template and completes after it;
3. all others generate again, and bytes equal to the text so far are swallowed; at the first difference: `interrupted`.
A node that refuses ways 1 and 2 is asked by way 3.
"""

import asyncio
import logging
import time
from contextlib import aclosing
from typing import Protocol

import msgspec
import orjson

from bus.codec.logprobs import ANSWER_BYTES_MAX as LOGPROBS_BYTES_MAX
from bus.jobs import ChatJob, estimate_new_tokens, estimate_prompt_tokens
from gpu_worker.engine import End, GenerateRequest
from gpu_worker.relay_engine.answer import Answer
from gpu_worker.relay_engine.call import NodeCalls
from gpu_worker.relay_engine.faults import CallFailed, NodeBroke, NoLogprobs
from gpu_worker.relay_engine.meter import Meter
from gpu_worker.relay_engine.scores import Placing, Scored, read_scores
from gpu_worker.relay_engine.tally import Tally, tokens_of
from gpu_worker.relay_engine.wire import (
    Chunk,
    NodeApi,
    Outgoing,
    base_of,
    openai_request,
    simple_request,
    template_request,
)

log = logging.getLogger(__name__)

SIDE_QUESTION_S = 5.0
UNKNOWN_ROUTE = (404, 405, 501)


class Listener(Protocol):
    """Where the text of one sequence goes."""

    @property
    def published(self) -> int:
        """Bytes of new text so far."""
        ...

    def publish(self, text: bytes, logprobs: bytes = b"") -> None: ...

    def scored(self) -> None:
        """The node has given log probabilities that make sense, whatever becomes of them and of the answer."""
        ...

    async def room(self) -> None:
        """Wait until more text is wanted."""
        ...


class NodeSpeaker:
    def __init__(self, node_id: str, api_url: str, calls: NodeCalls, meter: Meter) -> None:
        self._node_id = node_id
        self._base_url = base_of(api_url)
        self._calls = calls
        self._meter = meter
        self._api: NodeApi | None = None
        self._detecting: asyncio.Lock = asyncio.Lock()
        self._last_failure: tuple[float, CallFailed] | None = None

    def forget(self) -> None:
        """The node failed: look again what it speaks before the next call."""
        self._api = None

    async def answer(self, request: GenerateRequest, listener: Listener) -> End:
        """Raises CallFailed. A text that the listener got before stands, whatever happens."""
        job, said = request.job, request.forced_text
        api = await self._detect()
        if api.dialect == "simple":
            limit = estimate_new_tokens(job) if job.max_tokens is None else job.max_tokens
            try:
                return await self._call(request, listener, api, simple_request(job, limit), again=True)
            except CallFailed as failure:
                if failure.status not in UNKNOWN_ROUTE:
                    raise
            api = self._api = NodeApi("openai", api.base_url)  # it has no list of models, but perhaps the rest
        if said and (job.prompt is not None or api.continuation != "none"):
            try:
                return await self._continue(request, listener, api)
            except CallFailed as failure:
                other_way = failure.fault == "client" or isinstance(failure, NoLogprobs)
                if not other_way or failure.code == "context_length_exceeded" or listener.published:
                    raise
        return await self._call_openai(request, listener, api, job, "", job.max_tokens, again=True)

    async def _continue(self, request: GenerateRequest, listener: Listener, api: NodeApi) -> End:
        """Ways 1 and 2. Raises CallFailed, with fault "client" if the node does not take it."""
        job, said = request.job, request.forced_text.decode()
        spent = await self._count_tokens(api, job, said)
        left = None if job.max_tokens is None else job.max_tokens - spent
        if left is not None and left <= 0:
            return End("length", prompt_tokens=estimate_prompt_tokens(job), new_tokens=spent)
        if job.prompt is None and api.continuation == "template":
            job = await self._render(api, job)
        return await self._call_openai(request, listener, api, job, said, left, spent=spent)

    async def _call_openai(
        self,
        request: GenerateRequest,
        listener: Listener,
        api: NodeApi,
        job: ChatJob,
        said: str,
        max_tokens: int | None,
        *,
        again: bool = False,
        spent: int = 0,
    ) -> End:
        outgoing = openai_request(api, job, request.seed, said=said, max_tokens=max_tokens)
        try:
            return await self._call(request, listener, api, outgoing, again=again, spent=spent)
        except CallFailed as failure:
            if failure.fault != "client" or "stream_options" not in failure.message or not api.stream_options:
                raise
        api = self._api = msgspec.structs.replace(api, stream_options=False)
        outgoing = openai_request(api, job, request.seed, said=said, max_tokens=max_tokens)
        return await self._call(request, listener, api, outgoing, again=again, spent=spent)

    async def _call(
        self,
        request: GenerateRequest,
        listener: Listener,
        api: NodeApi,
        outgoing: Outgoing,
        *,
        again: bool = False,
        spent: int = 0,
    ) -> End:
        """One call. again: its answer begins at the start. spent: tokens of the text before it. Raises CallFailed.

        What nobody reads yet is kept until the end if another node could only say it again, perhaps in other words:
        then a lost node costs time, but never an `interrupted` answer.
        """
        job = request.job
        kept, kept_records = bytearray(), bytearray()
        keeps = not job.stream and job.prompt is None and api.continuation == "none"
        placing = Placing(len(request.forced_text), again=again)
        answer = Answer(request.forced_text, job.stop, job.max_tokens, again=again)
        tally = Tally(estimate_prompt_tokens(job))
        started = time.monotonic()
        chunks = self._calls.chunks(api.base_url, outgoing, job.max_tokens or estimate_new_tokens(job))
        async with aclosing(chunks):
            async for chunk in chunks:
                tally.count(chunk)
                if scores := _scores_of(chunk, job, first=tally.texts == 1):
                    listener.scored()
                records = placing.records(scores, job.logprobs or 0)
                if chunk.text:
                    self._measure(tally, time.monotonic(), started)
                if chunk.text or records:
                    text = answer.feed(chunk.text)
                    if keeps:
                        kept += text
                        kept_records += records
                        if len(kept_records) > LOGPROBS_BYTES_MAX:  # the service says why it takes no more
                            listener.publish(bytes(kept), bytes(kept_records))
                            kept, kept_records, keeps = bytearray(), bytearray(), False
                    else:
                        listener.publish(text, records)
                    await listener.room()
                if answer.ended:
                    break
        reason = answer.ended or tally.reason
        if not reason:
            raise NodeBroke("the node ended its answer before it was complete")
        listener.publish(bytes(kept) + answer.finish(), bytes(kept_records))
        size = answer.offset if again else answer.offset - len(request.forced_text)
        return End(reason, tally.prompt_tokens, spent + tally.new_tokens(size, streamed=outgoing.streams))

    def _measure(self, tally: Tally, now: float, started: float) -> None:
        if tally.texts == 1:
            self._meter.prefilled(tally.prompt_tokens, now - started)
        self._meter.decoded(1, now)

    # --- what the node is ---------------------------------------------------------------------------------------------

    async def _detect(self) -> NodeApi:
        """Asked once for all who wait, whatever the outcome. Raises CallFailed."""
        waiting_since = time.monotonic()
        async with self._detecting:
            if self._api is not None:
                return self._api
            if self._last_failure is not None and self._last_failure[0] >= waiting_since:
                failure = self._last_failure[1]
                raise CallFailed(failure.code, failure.message, failure.fault, failure.status)
            try:
                self._api = await self._calls.detect(self._base_url)
            except CallFailed as failure:
                self._last_failure = (time.monotonic(), failure)
                raise
            api = self._api
        log.info("node api detected", extra={"node": self._node_id, "api": api.dialect, "models": api.models})
        return api

    async def _count_tokens(self, api: NodeApi, job: ChatJob, text: str) -> int:
        """Tokens of `text` by the node's own tokenizer (vLLM and llama.cpp: POST /tokenize), else estimated."""
        estimate = tokens_of(len(text.encode()))
        if job.max_tokens is None or api.continuation == "none":
            return estimate
        question = {"model": api.model_for(job.model), "prompt": text, "content": text, "add_special_tokens": False}
        found = await self._ask(api, "/tokenize", orjson.dumps(question))
        match found:
            case {"count": int(count)}:
                return count
            case {"tokens": list(tokens)}:
                return len(tokens)
        return estimate

    async def _render(self, api: NodeApi, job: ChatJob) -> ChatJob:
        """The same job as raw prompt, by the node's template. Raises CallFailed with fault "client" if it cannot."""
        match await self._ask(api, "/apply-template", template_request(api, job)):
            case {"prompt": str(prompt)} if prompt:
                return msgspec.structs.replace(job, messages=(), prompt=prompt)
        raise CallFailed("bad_request", "the node cannot continue a text", fault="client")

    async def _ask(self, api: NodeApi, path: str, body: bytes) -> object:
        raw = await self._calls.post_json(api.base_url + path, body, SIDE_QUESTION_S)
        try:
            return orjson.loads(raw or b"null")
        except orjson.JSONDecodeError:
            return None


def _scores_of(chunk: Chunk, job: ChatJob, *, first: bool) -> tuple[Scored, ...]:
    """Its log probabilities, if the job asks for them. Raises NoLogprobs if they make no sense, or if the first text
    comes without any."""
    if job.logprobs is None:
        return ()
    scores = read_scores(chunk.logprobs)
    if scores is None and chunk.text and first:
        raise NoLogprobs
    return scores or ()
