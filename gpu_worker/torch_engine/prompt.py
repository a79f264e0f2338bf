"""From a request to a sequence that the scheduler can run, or to the end it has at once. No torch, no thread, no clock.

A resumed answer: its forced tokens are put behind the prompt, computed like it, and fed through the same text stream,
so that what is held back at that point, half a character or half a stop string, is held back again. From an engine with
other tokens there is only the forced text: tokens are found that spell it, and all of it counts as shown.
"""

import dataclasses
from typing import Literal

from gpu_worker.engine import End, GenerateRequest
from gpu_worker.torch_engine.chat_template import TemplateError
from gpu_worker.torch_engine.detokenizer import TextStream
from gpu_worker.torch_engine.logprob_trail import LogprobTrail, TokenScores
from gpu_worker.torch_engine.sequence import Sequence
from gpu_worker.torch_engine.text_model import TextModel

TOO_LONG = "context_length_exceeded"  # OpenAI's word


@dataclasses.dataclass
class Answer:
    """A sequence and its text. Offsets count what has been handed out, forced prefix included."""

    sequence: Sequence
    stream: TextStream
    text_offset: int  # UTF-8 bytes
    token_offset: int
    carries_tokens: bool  # False after a re-tokenised prefix: those ids are not what earlier attempts produced
    ready_text: str = ""  # let out by the forced tokens but never shown; goes out with the first piece
    ready_end: End | None = None  # the forced prefix already completes the answer
    trail: LogprobTrail | None = None  # only if the request asks for log probabilities

    def feed(self, token: int, scores: TokenScores | None = None) -> str:
        """One more token of the answer; the text that it lets out."""
        if self.trail is None:
            return self.stream.feed(token)
        if scores is not None:
            self.trail.note(token, scores, self.stream.held_before(token))
        text = self.stream.feed(token)
        self.trail.let_out(text)
        return text

    def finish(self) -> tuple[str, Literal["stop", "length"]]:
        """At its last token: the text that was held back, and how it ended, since that text may complete a stop."""
        text = self.stream.finish()
        return text, "stop" if self.stream.stopped else "length"

    def take_logprobs(self) -> bytes:
        """The records (bus.codec.logprobs) of the tokens fed since the last time."""
        return b"" if self.trail is None else self.trail.take()


def prepare(request: GenerateRequest, model: TextModel, *, context_max: int) -> Answer | End:
    """context_max: tokens that one sequence may have, prompt and answer together."""
    try:
        prompt = _prompt_tokens(request, model, context_max)
        _check_bias(request.job.sampling.logit_bias, model)
    except _Refused as refused:
        return _client_error(refused.code, str(refused), outgrown=refused.code == TOO_LONG)
    retokenised = bool(request.forced_text) and not request.forced_tokens
    try:
        forced, stream, ready = _shown_text(request, model) if retokenised else _shown_tokens(request, model)
    except _Disagree as error:
        return _node_error("interrupted", str(error))
    sequence = Sequence(
        id=request.sequence,
        tokens=[*prompt, *forced],
        prompt_len=len(prompt),
        forced_len=len(forced),
        total_max=_total_max(len(prompt), request.job.max_tokens, context_max),
        outgrows=outgrows(len(prompt), request.job.max_tokens, context_max),
        sampling=model.defaults.resolve(request.job, request.seed),
        ignore_eos=request.job.ignore_eos,
    )
    answer = Answer(
        sequence=sequence,
        stream=stream,
        text_offset=len(request.forced_text),
        token_offset=0 if retokenised else len(forced),
        carries_tokens=not retokenised,
        ready_text=ready,
        trail=None
        if request.job.logprobs is None
        else LogprobTrail(model, len(request.forced_text) + len(ready.encode()), restarts=retokenised),
    )
    answer.ready_end = _end_of_prefix(answer)
    return answer


class _Disagree(Exception):
    """What an earlier attempt stored cannot be gone on with here; the text says why."""


def _shown_tokens(request: GenerateRequest, model: TextModel) -> tuple[tuple[int, ...], TextStream, str]:
    """The tokens of an earlier attempt, the stream that has read them, and what it let out that was never shown."""
    forced = request.forced_tokens
    stream = TextStream(model.token_bytes, request.job.stop)
    text = "".join(map(stream.feed, forced)).encode()
    if not text.startswith(request.forced_text) or max(forced, default=0) >= model.vocabulary:
        raise _Disagree("the stored tokens and the stored text of the earlier attempt disagree")
    try:
        return forced, stream, text[len(request.forced_text) :].decode()
    except UnicodeDecodeError as error:
        raise _Disagree("the text of the earlier attempt ends within a character") from error


def _shown_text(request: GenerateRequest, model: TextModel) -> tuple[tuple[int, ...], TextStream, str]:
    """As `_shown_tokens`, of a text that other tokens wrote: all of it was shown."""
    try:
        shown = request.forced_text.decode()
    except UnicodeDecodeError as error:
        raise _Disagree("the text of the earlier attempt is not UTF-8") from error
    forced = model.respell(shown)
    if forced is None:
        raise _Disagree("this model has no tokens that spell the text of the earlier attempt")
    return tuple(forced), TextStream(model.token_bytes, request.job.stop, shown), ""


class _Refused(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def _prompt_tokens(request: GenerateRequest, model: TextModel, context_max: int) -> list[int]:
    job = request.job
    try:
        text = job.prompt if job.prompt is not None else model.render(job.messages)
    except TemplateError as error:
        raise _Refused("bad_request", str(error)) from error
    try:
        at_least = model.too_many(text, context_max)
        tokens = model.encode(text, special=job.prompt is not None) if at_least is None else []
    except Exception as error:  # tokenizers raises bare Exception, and TypeError for lone surrogates
        raise _Refused("bad_request", f"the prompt cannot be tokenised: {error}") from error
    if at_least is not None:
        raise _too_long(context_max, f"at least {at_least}")
    if not tokens:
        raise _Refused("bad_request", "the prompt is empty")
    if max(tokens) >= model.vocabulary:
        raise _Refused("bad_request", "the prompt holds a special token that this model has no embedding for")
    if len(tokens) >= context_max:
        raise _too_long(context_max, str(len(tokens)))
    return tokens


def _check_bias(bias: tuple[tuple[int, float], ...], model: TextModel) -> None:
    foreign = next((token for token, _ in bias if token >= model.vocabulary), None)
    if foreign is not None:
        message = f"logit_bias names token {foreign}, but this model's tokens are 0 to {model.vocabulary - 1}"
        raise _Refused("bad_request", message)


def _too_long(context_max: int, tokens: str) -> _Refused:
    return _Refused(
        TOO_LONG,
        f"This model's maximum context length is {context_max} tokens. However, your messages resulted in {tokens}"
        " tokens. Please reduce the length of the messages.",
    )


def outgrows(prompt_len: int, max_tokens: int | None, context_max: int) -> bool:
    """Whether the context is what ends an answer that does not end by itself."""
    return max_tokens is None or prompt_len + max_tokens > context_max


def _total_max(prompt_len: int, max_tokens: int | None, context_max: int) -> int:
    """max_tokens is an upper bound, so a larger wish than the context leaves is no error: it ends with `length`."""
    return context_max if max_tokens is None else min(context_max, prompt_len + max_tokens)


def _end_of_prefix(answer: Answer) -> End | None:
    sequence = answer.sequence
    if answer.stream.stopped:
        return End("stop", prompt_tokens=sequence.prompt_len, new_tokens=sequence.answer_len)
    if len(sequence.tokens) >= sequence.total_max:
        reason: Literal["stop", "length"] = "length"
        if answer.carries_tokens:
            last, reason = answer.finish()
            answer.ready_text += last
        return End(reason, prompt_tokens=sequence.prompt_len, new_tokens=sequence.answer_len)
    return None


def _client_error(code: str, message: str, *, outgrown: bool) -> End:
    return End("error", error_code=code, error_message=message, fault="client", outgrown=outgrown)


def _node_error(code: str, message: str) -> End:
    return End("error", error_code=code, error_message=message, fault="node")
