"""What the gateway measures of requests, under the names that dashboards and autoscalers of LLM servers use."""

import time
from collections.abc import Callable

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from echelon.pb import inference_pb2

PREFIX = "echelon:"
_FINISH_REASONS: dict[int, str] = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
    inference_pb2.FINISH_REASON_ABORT: "abort",
}
_REQUEST_BUCKETS_S = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0,
)  # fmt: skip
_TOKEN_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 10.0,
)  # fmt: skip

# Of a request: its status, how long it took in seconds, and its last message unless it has failed.
OnEnd = Callable[[grpc.StatusCode, float, inference_pb2.GenerateComplete | None], None]


class RequestMetrics:
    """Histograms and counters of all requests of one gateway, in `registry`. `now` is a monotonic clock, seconds."""

    def __init__(self, model_name: str, *, now: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self.now = now
        self._families: list[Histogram] = []
        self._histogram(
            "time_to_first_token_seconds", "Time from arrival at the gateway to the first token.", _REQUEST_BUCKETS_S
        )
        self._histogram(
            "inter_token_latency_seconds",
            "Time between two tokens of a sample. Tokens that one round commits share the time equally.",
            _TOKEN_BUCKETS_S,
        )
        self._histogram(
            "request_time_per_output_token_seconds",
            "Time after a request's first token, divided by the number of tokens after it.",
            _TOKEN_BUCKETS_S,
        )
        self._histogram(
            "e2e_request_latency_seconds",
            "Time from arrival at the gateway to the end of the request.",
            _REQUEST_BUCKETS_S,
        )
        self._histogram("request_queue_time_seconds", "Time in the scheduler's queue.", _REQUEST_BUCKETS_S)
        self._histogram(
            "request_prefill_time_seconds", "Time from leaving the queue to the first token.", _REQUEST_BUCKETS_S
        )
        self._histogram(
            "request_decode_time_seconds", "Time from the first token to the end of the request.", _REQUEST_BUCKETS_S
        )
        self._spares = Gauge(
            PREFIX + "spares",
            "Processes that could take the place of a rank that is lost.",
            ["model_name", "state"],
            registry=self.registry,
        )
        self._num_spares = {"ready": 0, "wanted": 0}
        self.use(model_name)
        self._successes = self._counter("request_success", "Samples that finished, by reason.", "finished_reason")
        self._errors = self._counter("request_errors", "Requests that failed, by gRPC status code.", "code")

    def use(self, model_name: str) -> None:
        """What is measured from now on is of this model."""
        self._model_name = model_name
        children = [family.labels(model_name) for family in self._families]
        self.first_token, self.inter_token, self.per_output_token, self.end_to_end, *others = children
        self.queue, self.prefill, self.decode = others
        self._show_spares()

    def start(self, arrived_s: float, on_end: "OnEnd" = lambda code, elapsed_s, complete: None) -> "RequestMeter":
        """Measures a request that arrived then, by `now`. `on_end` is called once it has ended."""
        return RequestMeter(self, arrived_s, on_end)

    def note_spares(self, *, ready: int, wanted: int) -> None:
        self._num_spares = {"ready": ready, "wanted": wanted}
        self._show_spares()

    def _show_spares(self) -> None:
        """Under the model that is served now, and no other."""
        self._spares.clear()
        for state, number in self._num_spares.items():
            self._spares.labels(self._model_name, state).set(number)

    def count_error(self, code: grpc.StatusCode) -> None:
        self._errors.labels(self._model_name, code.name).inc()

    def count_complete(self, complete: inference_pb2.GenerateComplete) -> None:
        for finished in complete.finished:
            self._successes.labels(self._model_name, _FINISH_REASONS.get(finished.reason, "unspecified")).inc()

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> None:
        family = Histogram(PREFIX + name, text, ["model_name"], buckets=buckets, registry=self.registry)
        self._families.append(family)

    def _counter(self, name: str, text: str, *more_labels: str) -> Counter:
        return Counter(PREFIX + name, text, ["model_name", *more_labels], registry=self.registry)


class RequestMeter:
    """Measures one request. It sees everything that the scheduler sends, even if the client does not read."""

    def __init__(self, metrics: RequestMetrics, arrived_s: float, on_end: OnEnd) -> None:
        self._metrics = metrics
        self._on_end = on_end
        self._arrived_s = arrived_s
        self._first_token_s: float | None = None
        self._last_token_s: dict[int, float] = {}  # by sample
        self._num_tokens = 0

    def on_chunk(self, chunk: inference_pb2.GenerateChunk) -> None:
        num_tokens = len(chunk.token_ids)
        if not num_tokens:
            return  # text without new tokens: it had been waiting for a whole character or stop string
        now = self._metrics.now()
        if self._first_token_s is None:
            self._first_token_s = now
            self._metrics.first_token.observe(now - self._arrived_s)
        last = self._last_token_s.get(chunk.index)
        if last is not None:
            for _ in range(num_tokens):
                self._metrics.inter_token.observe((now - last) / num_tokens)
        self._last_token_s[chunk.index] = now
        self._num_tokens += num_tokens

    def on_complete(self, complete: inference_pb2.GenerateComplete) -> None:
        now, metrics, timings = self._metrics.now(), self._metrics, complete.timings
        metrics.end_to_end.observe(now - self._arrived_s)
        metrics.queue.observe(timings.queue_s)
        if self._first_token_s is not None:
            metrics.prefill.observe(timings.first_token_s - timings.queue_s)
            metrics.decode.observe(timings.total_s - timings.first_token_s)
            num_samples = len(self._last_token_s)
            if self._num_tokens > num_samples:  # samples run side by side
                spent_s = sum(last - self._first_token_s for last in self._last_token_s.values())
                metrics.per_output_token.observe(spent_s / (self._num_tokens - num_samples))
        metrics.count_complete(complete)
        self._on_end(grpc.StatusCode.OK, now - self._arrived_s, complete)

    def on_error(self, code: grpc.StatusCode) -> None:
        self._metrics.count_error(code)
        self._on_end(code, self._metrics.now() - self._arrived_s, None)
