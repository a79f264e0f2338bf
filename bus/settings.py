"""Every setting of Millrace, in one frozen object that is checked before anything connects.

A field is a setting: its environment variable is `MILLRACE_<FIELD>` (and `REDIS_URL`), its metadata is the line in the
README's table. Only `__main__` modules and the `millrace` command read the environment; everything else is handed a
`Settings`. A misspelt name or a bad value stops the start with one line that says what to do.

Times end in `_ms`, sizes in `_max` or `_bytes`. Tests make the times short with `Settings().changed(lease_ms=500, ...)`.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from bus.ids import is_model_name

EngineKind = Literal["torch", "relay", "echo"]
LogLevel = Literal["debug", "info", "warning", "error"]
Dtype = Literal["auto", "float32", "bfloat16"]
Kernels = Literal["auto", "compiled", "torch"]
PREFIX = "MILLRACE_"
SERVER_URL_FILE = "redis-url"  # in var_dir: where `millrace up` says which server its fleet uses


class SettingsError(Exception):
    """A setting is unknown or has a value that cannot work; the message is one line that says what to do."""


def _setting(default: Any, group: str, doc: str, *, least: int | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"group": group, "doc": doc, "least": least})


REDIS, JOBS, LIVE, GATEWAY, NODES, WORKER, RELAY, ECHO, LOCAL = (
    "Redis",
    "Jobs",
    "Liveness",
    "Gateway",
    "Nodes over HTTP",
    "Torch worker",
    "Relay",
    "Echo engine",
    "This machine",
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    redis_url: str = _setting("", REDIS, "server to use: `redis://`, `rediss://`, `unix://`, `redis+sentinel://`, `redis+cluster://`; empty: `millrace up` starts its own")
    cells: int = _setting(1, REDIS, "cells of the key space; 2-4 x the masters of a cluster; fixed once data exists", least=1)
    connect_timeout_ms: int = _setting(5_000, REDIS, "longest wait for a connection to the server", least=1)
    send_wait_ms: int = _setting(5_000, REDIS, "how long a command waits for a lost connection to come back before it fails", least=0)
    block_ms: int = _setting(2_000, REDIS, "BLOCK of stream reads; the socket times out 3 s later", least=10)

    queue_max: int = _setting(2_000, JOBS, "waiting jobs per model; beyond it a submit is refused with 429", least=1)
    front_door_max: int = _setting(2_000, JOBS, "entries of the `jobs` stream; beyond it each is answered `full`", least=1)
    job_deadline_ms: int = _setting(600_000, JOBS, "a job without its own deadline ends after this", least=100)
    result_ttl_ms: int = _setting(600_000, JOBS, "how long a finished job and its text can be read", least=1_000)
    job_keep_ms: int = _setting(3_600_000, JOBS, "an unfinished job's keys expire this long after its deadline", least=1_000)
    idem_extra_ms: int = _setting(3_000_000, JOBS, "an idempotency key is remembered this long after the job's deadline; below `job_keep_ms`", least=0)
    out_ttl_ms: int = _setting(120_000, JOBS, "out-streams (`gateway:*`, `reply:*`) are trimmed to, and expire after, this time", least=1_000)
    alone_ms: int = _setting(10_000, JOBS, "how long a node stays reserved for a job that crashed twice", least=100)
    backoff_ms: int = _setting(1_000, JOBS, "hold-back after a node error; doubled with each", least=1)
    node_errors_max: int = _setting(4, JOBS, "a job fails at this many node errors", least=1)
    crashes_max: int = _setting(3, JOBS, "a job becomes a dead letter at this many crashes", least=1)
    dead_keep_ms: int = _setting(604_800_000, JOBS, "how long dead letters and events are kept", least=1_000)
    client_grace_ms: int = _setting(2_000, JOBS, "a client that went away may resume within this time before its job is cancelled", least=0)
    silence_ms: int = _setting(10_000, JOBS, "a waiting client's job is asked for after this much silence", least=100)

    lease_ms: int = _setting(10_000, LIVE, "lease of workers, relays, gateways and dispatchers", least=100)
    renew_ms: int = _setting(2_500, LIVE, "how often a lease is renewed; at most a third of `lease_ms`", least=10)
    self_fence_ms: int = _setting(8_000, LIVE, "a worker that could not renew for this long stops publishing; below `lease_ms`", least=50)
    stall_limit_ms: int = _setting(60_000, LIVE, "a busy engine without progress for this long loses its lease", least=100)
    unread_ms: int = _setting(5_000, LIVE, "an assigned job that its worker has not started after this goes back", least=50)
    finish_keep_ms: int = _setting(15_000, LIVE, "a worker remembers a finish this long, to repeat it to a server that lost it", least=0)
    drain_grace_ms: int = _setting(3_000, LIVE, "how long a stopping worker or gateway finishes what it runs before it hands the rest back", least=0)
    node_ttl_ms: int = _setting(30_000, LIVE, "a node is inactive this long after its last heartbeat", least=100)
    node_keep_ms: int = _setting(3_600_000, LIVE, "an inactive node is forgotten this long after its last heartbeat", least=100)
    beat_ms: int = _setting(10_000, LIVE, "how often workers send a heartbeat; at most a third of `node_ttl_ms`", least=10)
    sweep_ms: int = _setting(1_000, LIVE, "how often one dispatcher looks for what has lapsed", least=10)
    take_over_ms: int = _setting(1_000, LIVE, "a queue whose head waited this long is served by any dispatcher", least=10)
    claim_idle_ms: int = _setting(5_000, LIVE, "entries of `jobs` and `nodes` left by a dead consumer are taken over after this", least=50)

    gateway_host: str = _setting("127.0.0.1", GATEWAY, "address that gateways listen on; `0.0.0.0` for all")
    gateway_port: int = _setting(8080, GATEWAY, "port of the first gateway", least=0)
    gateway2_port: int = _setting(8081, GATEWAY, "port of the second gateway of the Procfile", least=0)
    open_chat: bool = _setting(True, GATEWAY, "`/api/chat/gpu` answers without a key")
    open_rate_per_minute: int = _setting(60, GATEWAY, "chats a minute and client address without a key; 0: no limit", least=0)
    status_rate_per_minute: int = _setting(600, GATEWAY, "calls of `/api/gpu/status` a minute and client address; 0: no limit", least=0)
    body_max: int = _setting(8_388_608, GATEWAY, "largest request body in bytes; beyond it 413", least=1_024)
    metrics_open: bool = _setting(True, GATEWAY, "`/metrics` answers without a key")
    trust_forwarded: bool = _setting(False, GATEWAY, "take a client's address from the last hop of `X-Forwarded-For`: only behind a proxy of your own")
    sse_ping_ms: int = _setting(10_000, GATEWAY, "a silent event stream gets a comment this often, so that proxies keep it open", least=10)
    sse_buffer_max: int = _setting(262_144, GATEWAY, "bytes a slow reader may lag behind before its stream is cut; it can resume", least=4_096)
    first_frame_wait_ms: int = _setting(1_000, GATEWAY, "a stream's status line waits this long for the first text, so that an early failure has its own status", least=0)
    key_cache_ms: int = _setting(5_000, GATEWAY, "a revoked key may be accepted for this long", least=0)
    register_wait_ms: int = _setting(5_000, GATEWAY, "longest wait for the registry to apply a registration; then 504", least=100)

    node_allow: str = _setting("", NODES, "comma list of CIDRs and host names that nodes may have, `*` = any; empty: public addresses only")
    layers_total: int = _setting(32, NODES, "layers of the fleet's model while no node reports more; a node without `layers` gets the least covered range", least=1)
    node_health_check: bool = _setting(True, NODES, "ask `{api_url}/health` before a node is accepted; `off` for closed networks")
    node_health_timeout_ms: int = _setting(5_000, NODES, "longest wait for that answer", least=100)

    engine: EngineKind = _setting("torch", WORKER, "engine of a worker: `torch`, `relay` or `echo`")
    node_id: str = _setting("", WORKER, "name of the worker's node; empty: host name, engine and a number")
    model: str = _setting("smollm2-135m-instruct", WORKER, "model to serve, and the one that requests without a model get")
    model_path: str = _setting("", WORKER, "GGUF file, Hugging Face directory or hub id (`owner/name`); empty: the fetched default model")
    capacity: int = _setting(8, WORKER, "sequences that a worker decodes at once", least=1)
    threads: int | None = _setting(None, WORKER, "CPU threads of a step; empty: all cores, all but one on machines of more than 4", least=1)
    dtype: Dtype = _setting("auto", WORKER, "weights: `float32`, `bfloat16`, or `auto`: bfloat16 on a GPU, float32 on a CPU")
    kernels: Kernels = _setting("auto", WORKER, "on a CPU: `compiled` ones, `torch`'s operations, or `auto`: compiled where the machine and the model allow")
    kv_tokens: int | None = _setting(None, WORKER, "tokens that the KV cache holds, 45 KiB each with the default model on a CPU; empty: one whole context, or 1,024 for each of `MILLRACE_CAPACITY` if that is more, as far as memory allows", least=64)
    prefill_chunk: int = _setting(512, WORKER, "most prompt tokens processed in one step, so that running answers go on", least=1)
    speculate: int = _setting(0, WORKER, "tokens guessed at once from what was said before (prompt lookup) and verified by the model; 0: none; 8 suits edits, quotes and code", least=0)
    flush_ms: int = _setting(30, WORKER, "how often tokens are published; the first goes at once", least=1)

    relay_connect_ms: int = _setting(3_000, RELAY, "longest wait for a connection to a node", least=10)
    relay_first_byte_ms: int = _setting(60_000, RELAY, "longest wait for the first byte of an answer", least=10)
    relay_idle_ms: int = _setting(30_000, RELAY, "longest silence inside a streamed answer", least=10)
    relay_total_ms: int = _setting(600_000, RELAY, "longest call as a whole", least=10)
    breaker_ms: int = _setting(2_000, RELAY, "a failing node is left out for this long, doubled with each failure", least=1)
    breaker_max_ms: int = _setting(60_000, RELAY, "longest time that a failing node is left out before it is probed", least=1)

    echo_models: str = _setting("echo", ECHO, "comma list of model names that the echo engine answers to")
    echo_delay_ms: int = _setting(0, ECHO, "pause before each token", least=0)
    echo_first_ms: int = _setting(0, ECHO, "pause before the first token", least=0)
    echo_fail_at: int | None = _setting(None, ECHO, "end with a node error at this token", least=0)
    echo_poison: str = _setting("", ECHO, "a prompt that contains this kills the worker's process")

    var_dir: str = _setting("var", LOCAL, "data, logs, keys and the model cache of this machine")
    log_level: LogLevel = _setting("info", LOCAL, "`debug`, `info`, `warning` or `error`")
    log_json: bool = _setting(False, LOCAL, "log lines as JSON objects")
    log_file_max: int = _setting(10_485_760, LOCAL, "bytes of one file in `var/log`; one older file is kept", least=10_000)

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            _check_type(setting, getattr(self, setting.name))
        _check_together(self)

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Self:
        """Parse `REDIS_URL` and all `MILLRACE_*`; an empty value means the default.

        Raises SettingsError on an unknown name (with the nearest right one) or a bad value.
        """
        settings = {env_name(setting): setting for setting in dataclasses.fields(cls)}
        unknown = sorted(name for name in environ if name.startswith(PREFIX) and name not in settings)
        if unknown:
            raise SettingsError(f"unknown setting {unknown[0]}{_nearest(unknown[0], list(settings))}")
        given = {name: environ[name].strip() for name in settings if environ.get(name, "").strip()}
        return cls(**{settings[name].name: _parse(settings[name], text) for name, text in given.items()})

    def changed(self, **changes: Any) -> Self:
        """A copy with other values, checked again; for command line flags and tests."""
        return dataclasses.replace(self, **changes)

    def to_env(self) -> dict[str, str]:
        """The variables that make `from_env` build an equal object; for child processes."""
        defaults = type(self)()
        values = {s: getattr(self, s.name) for s in dataclasses.fields(self) if getattr(self, s.name) != getattr(defaults, s.name)}
        return {env_name(s): ("on" if value else "off") if isinstance(value, bool) else str(value) for s, value in values.items()}


def read_settings(environ: Mapping[str, str]) -> Settings:
    """What a role's `__main__` calls: the settings, with the server of the running fleet when REDIS_URL is not set.

    `millrace up` leaves the address of its embedded server in `<var_dir>/redis-url`. Raises SettingsError.
    """
    settings = Settings.from_env(environ)
    if settings.redis_url:
        return settings
    left = Path(settings.var_dir) / SERVER_URL_FILE
    try:
        url = left.read_text(encoding="utf-8").strip()
    except OSError:
        url = ""
    if not url:
        raise SettingsError(f"REDIS_URL is not set and no fleet runs here (no {left}): set REDIS_URL, or start one with `make run`")
    return settings.changed(redis_url=url)


def env_name(setting: "dataclasses.Field[Any]") -> str:
    return "REDIS_URL" if setting.name == "redis_url" else PREFIX + setting.name.upper()


def _nearest(name: str, names: list[str]) -> str:
    short = {one.removeprefix(PREFIX): one for one in names}
    near = difflib.get_close_matches(name.removeprefix(PREFIX), short, n=1)
    return f": did you mean {short[near[0]]}?" if near else "; README.md lists them all"


def _parse(setting: "dataclasses.Field[Any]", text: str) -> Any:
    kind = setting.type
    if kind is bool:
        words = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False, "0": False}
        if text.lower() not in words:
            raise SettingsError(f"{env_name(setting)}={text!r} is neither `on` nor `off`")
        return words[text.lower()]
    if kind is int or isinstance(kind, types.UnionType):
        try:
            return int(text)
        except ValueError:
            raise SettingsError(f"{env_name(setting)}={text!r} is not a whole number") from None
    return text


def _check_type(setting: "dataclasses.Field[Any]", value: Any) -> None:
    name, kind, least = env_name(setting), setting.type, setting.metadata["least"]
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise SettingsError(f"{name}={value!r} is not one of {', '.join(choices)}")
    elif kind is bool or kind is str:
        if not isinstance(value, typing.cast(type, kind)):
            raise SettingsError(f"{name}={value!r} is not a {typing.cast(type, kind).__name__}")
    elif value is None and isinstance(kind, types.UnionType):
        return
    elif type(value) is not int:
        raise SettingsError(f"{name}={value!r} is not a whole number")
    elif least is not None and value < least:
        raise SettingsError(f"{name}={value} is below its least value {least}")


def _check_together(s: Settings) -> None:
    """Relations between settings that the protocol's promises rest on (docs/operations.md says why)."""
    if s.renew_ms * 3 > s.lease_ms:
        raise SettingsError(f"MILLRACE_RENEW_MS={s.renew_ms} is over a third of MILLRACE_LEASE_MS={s.lease_ms}: lower it")
    if not s.renew_ms < s.self_fence_ms < s.lease_ms:
        raise SettingsError(f"MILLRACE_SELF_FENCE_MS={s.self_fence_ms} must lie between MILLRACE_RENEW_MS={s.renew_ms} and MILLRACE_LEASE_MS={s.lease_ms}")
    if s.beat_ms * 3 > s.node_ttl_ms:
        raise SettingsError(f"MILLRACE_BEAT_MS={s.beat_ms} is over a third of MILLRACE_NODE_TTL_MS={s.node_ttl_ms}: lower it")
    if s.node_keep_ms < s.node_ttl_ms:
        raise SettingsError(f"MILLRACE_NODE_KEEP_MS={s.node_keep_ms} is below MILLRACE_NODE_TTL_MS={s.node_ttl_ms}: raise it")
    if s.idem_extra_ms >= s.job_keep_ms:
        raise SettingsError(f"MILLRACE_IDEM_EXTRA_MS={s.idem_extra_ms} must be below MILLRACE_JOB_KEEP_MS={s.job_keep_ms}")
    for name, port in (("GATEWAY_PORT", s.gateway_port), ("GATEWAY2_PORT", s.gateway2_port)):
        if port > 65_535:
            raise SettingsError(f"MILLRACE_{name}={port} is no port: 1 to 65535")
    if not is_model_name(s.model):  # it is part of keys and of every beat, and no request could name it
        raise SettingsError(f"MILLRACE_MODEL={s.model!r} is no model name: 1 to 128 of A-Z a-z 0-9 _./@+:- and not :parts at its end")
