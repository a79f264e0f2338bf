"""The two HTTP APIs of nodes as pure functions: job -> request body, received JSON -> `Chunk`."""

from typing import Any, Literal

import msgspec
import orjson

from bus.jobs import ChatJob
from gpu_worker.relay_engine.faults import NodeBroke, failure_of_event

Dialect = Literal["openai", "simple"]
Continuation = Literal["none", "final_message", "template"]
CONTINUES: dict[str, Continuation] = {
    # `owned_by` in /v1/models -> how that server is made to go on with a text.
    "vllm": "final_message",  # continue_final_message + add_generation_prompt=false
    "sglang": "final_message",
    "llamacpp": "template",  # its assistant prefill can be switched off, /apply-template cannot
}
SEED_MASK = 0x7FFF_FFFF  # llama.cpp takes 32 bits, others signed ones: 31 are understood everywhere


class NodeApi(msgspec.Struct, frozen=True):
    """What a node turned out to speak."""

    dialect: Dialect
    base_url: str  # without /v1 and trailing slash
    models: tuple[str, ...] = ()  # ids it lists; empty for simple nodes
    continuation: Continuation = "none"
    stream_options: bool = True  # off for servers that refuse the field, and with it the usage of a stream

    def model_for(self, name: str) -> str:
        """The node's own name for a model of the fleet."""
        return self.models[0] if len(self.models) == 1 and name not in self.models else name


class Outgoing(msgspec.Struct, frozen=True):
    path: str
    body: bytes
    streams: bool


class Chunk(msgspec.Struct, frozen=True):
    """What one event of an answer adds. An empty chunk is a sign of life."""

    text: str = ""
    finish: Literal["", "stop", "length"] = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    done: bool = False  # [DONE]
    logprobs: object = None  # of the tokens of this text, as the node sent them: read only for a job that asks


def base_of(api_url: str) -> str:
    """Node owners register `http://host`, `http://host/` or `http://host/v1`."""
    return api_url.rstrip("/").removesuffix("/v1").rstrip("/")


def read_models(base_url: str, body: bytes) -> NodeApi | None:
    """The answer to GET /v1/models; None if that is not OpenAI's list of models."""
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    data = found.get("data") if isinstance(found, dict) else None
    if not isinstance(data, list):
        return None
    models = [one for one in data if isinstance(one, dict) and isinstance(one.get("id"), str)]
    owners = {str(one.get("owned_by")).lower() for one in models}
    ways: list[Continuation] = [CONTINUES[owner] for owner in sorted(owners) if owner in CONTINUES]
    return NodeApi("openai", base_url, tuple(one["id"] for one in models), ways[0] if ways else "none")


# --- requests ---------------------------------------------------------------------------------------------------


def openai_request(api: NodeApi, job: ChatJob, seed: int, *, said: str = "", max_tokens: int | None = None) -> Outgoing:
    """A streamed call. With `said` the node is asked to go on after that text (`api.continuation` must allow it)."""
    body: dict[str, Any] = {
        "model": api.model_for(job.model),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    body |= _sampling(job) | {"seed": seed & SEED_MASK}
    if job.stop:
        body["stop"] = list(job.stop)
    if job.ignore_eos:
        body["ignore_eos"] = True
    if job.prompt is not None:
        asked = {} if job.logprobs is None else {"logprobs": job.logprobs}
        return Outgoing("/v1/completions", orjson.dumps(body | asked | {"prompt": job.prompt + said}), streams=True)
    if job.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": job.logprobs}
    body["messages"] = _messages(job)
    if said:
        body["messages"].append({"role": "assistant", "content": said})
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    return Outgoing("/v1/chat/completions", orjson.dumps(body), streams=True)


def template_request(api: NodeApi, job: ChatJob) -> bytes:
    """Body for llama.cpp's POST /apply-template, which answers `{"prompt": ...}`."""
    return orjson.dumps({"model": api.model_for(job.model), "messages": _messages(job)})


def simple_request(job: ChatJob, max_new_tokens: int) -> Outgoing:
    """`POST /chat {prompt, max_new_tokens, ...}` -> `{response}`: no messages, so they are written out."""
    body = {"prompt": flat_prompt(job), "max_new_tokens": max_new_tokens} | _sampling(job)
    return Outgoing("/chat", orjson.dumps(body), streams=False)


def flat_prompt(job: ChatJob) -> str:
    """One user message stands as it is; a conversation becomes a transcript that ends where the answer begins."""
    if job.prompt is not None:
        return job.prompt
    if len(job.messages) == 1 and job.messages[0].role == "user":
        return job.messages[0].content
    titles = {"system": "", "developer": "", "user": "User: ", "assistant": "Assistant: ", "tool": "Tool: "}
    lines = [titles.get(one.role, "") + one.content for one in job.messages if one.content]
    return "\n\n".join([*lines, "Assistant:"])


def _messages(job: ChatJob) -> list[dict[str, str]]:
    # Templates of most open models know no "developer"; OpenAI defines it as the new word for "system".
    return [
        {"role": "system" if one.role == "developer" else one.role, "content": one.content}
        | ({"name": one.name} if one.name else {})
        for one in job.messages
    ]


def _sampling(job: ChatJob) -> dict[str, Any]:
    """What the request says, by the names that OpenAI, vLLM, SGLang and llama.cpp know."""
    names = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    chosen = {name: value for name in names if (value := getattr(job.sampling, name)) is not None}
    if job.sampling.logit_bias:
        chosen["logit_bias"] = {str(token): bias for token, bias in job.sampling.logit_bias}
    return chosen


# --- answers ----------------------------------------------------------------------------------------------------


def read_event(data: str) -> Chunk:
    """One event of a stream. Raises CallFailed: the node reported an error, or what it sent is no chunk."""
    if data.strip() == "[DONE]":
        return Chunk(done=True)
    return _read_choice(_object(data.encode()))


def read_answer(body: bytes) -> Chunk:
    """A whole answer of the OpenAI API, from a node that does not stream. Raises CallFailed."""
    chunk = _read_choice(_object(body))
    return msgspec.structs.replace(chunk, finish=chunk.finish or "stop", done=True)


def read_simple(body: bytes) -> Chunk:
    """The answer of a simple node. Raises CallFailed."""
    found = _object(body)
    text = found.get("response")
    if not isinstance(text, str):
        raise NodeBroke("the node's answer has no text in `response`")
    return Chunk(text=text, finish="stop", done=True)


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise NodeBroke("the node sent something that is not JSON") from error
    if not isinstance(found, dict):
        raise NodeBroke("the node sent JSON that is no object")
    if found.get("error") or found.get("object") == "error":
        raise failure_of_event(found)
    return found


def _read_choice(found: dict[str, Any]) -> Chunk:
    usage = found.get("usage")
    prompt, completion = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    choices = found.get("choices")
    if not choices:
        return Chunk(prompt_tokens=prompt, completion_tokens=completion)
    choice = choices[0] if isinstance(choices, list) else None
    if not isinstance(choice, dict):
        raise NodeBroke("the node sent a choice that is no object")
    holder = choice.get("delta") or choice.get("message")
    text = holder.get("content") if isinstance(holder, dict) else choice.get("text")
    if text is not None and not isinstance(text, str):
        raise NodeBroke("the node sent a text that is no string")
    finish = _finish(choice.get("finish_reason"))
    return Chunk(text or "", finish, prompt, completion, logprobs=choice.get("logprobs"))


def _finish(reason: object) -> Literal["", "stop", "length"]:
    if not isinstance(reason, str) or not reason:
        return ""
    return "length" if reason == "length" else "stop"


def _count(usage: object, name: str) -> int:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 else 0
