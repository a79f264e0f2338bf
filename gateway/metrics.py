"""What Prometheus may ask. Labels are bounded: route templates, status classes, model and reason names, never an id."""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
FIRST_TOKEN_BUCKETS_S: Final = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
)
LATENCY_BUCKETS_S: Final = (
    0.005,
    0.02,
    0.1,
    0.3,
    0.5,
    0.8,
    1,
    1.5,
    2,
    2.5,
    5,
    10,
    15,
    20,
    30,
    40,
    60,
    120,
    240,
    480,
    960,
)
LABEL_VALUES_MAX: Final = 200  # models named by clients must not fill the memory of Prometheus
OTHER: Final = "other"


class Metrics:
    """One registry per gateway, so that two gateways in one process (tests) do not collide."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._models: set[str] = set()
        self.requests = Counter(
            "http_requests", "HTTP requests answered", ("method", "handler", "status"), registry=self.registry
        )
        self.latency = Histogram(
            "millrace_e2e_request_latency_seconds",
            "From a chat's arrival to its whole answer",
            ("model_name",),
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "millrace_time_to_first_token_seconds",
            "From a chat's arrival to its first text",
            ("model_name",),
            buckets=FIRST_TOKEN_BUCKETS_S,
            registry=self.registry,
        )
        self.ended = Counter(
            "millrace_request_success",
            "Chats ended, by reason",
            ("model_name", "finished_reason"),
            registry=self.registry,
        )
        self.refused = Counter(
            "millrace_admission_rejections", "Chats not admitted", ("reason",), registry=self.registry
        )
        self.prompt_tokens = Counter(
            "millrace_prompt_tokens", "Prompt tokens of ended chats", ("model_name",), registry=self.registry
        )
        self.new_tokens = Counter(
            "millrace_generation_tokens", "Tokens generated", ("model_name",), registry=self.registry
        )
        self.open_chats = Gauge("millrace_open_chats", "Chats whose clients wait here", registry=self.registry)
        self.nodes = Gauge("millrace_nodes", "Registered nodes", ("state",), registry=self.registry)
        self.running = Gauge("millrace_requests_running", "Jobs reserved on nodes", registry=self.registry)
        self.drafted = Gauge(
            "millrace_draft_tokens", "Tokens guessed by speculation, of the workers that are up", registry=self.registry
        )
        self.accepted = Gauge(
            "millrace_draft_tokens_accepted", "Guessed tokens that the model agreed with", registry=self.registry
        )
        self.loop_lag = Gauge(
            "millrace_worker_loop_lag_seconds",
            "How late event loops of workers are: 99th percentile of 10 s, of the worst worker",
            registry=self.registry,
        )

    def model_label(self, model: str) -> str:
        if model in self._models:
            return model
        if len(self._models) >= LABEL_VALUES_MAX:
            return OTHER
        self._models.add(model)
        return model

    def exposition(self) -> bytes:
        return generate_latest(self.registry)
