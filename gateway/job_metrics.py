"""Jobs as Prometheus metrics, read from their store at each scrape."""

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.jobs.jobs import JobNumbers
from gateway.jobs.records import JobStatus
from gateway.metrics import PREFIX


class JobCollector(Collector):
    """Tells of `numbers`, set before each scrape. None: they are not known here, and there are no series."""

    def __init__(self, model_name: Callable[[], str]) -> None:
        self.numbers: JobNumbers | None = None
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        states = GaugeMetricFamily(PREFIX + "jobs", "Jobs that are kept.", labels=["model_name", "state"])
        left = self._gauge("job_items_left", "Items without a result, of all jobs.")
        age = self._gauge("oldest_job_age_seconds", "Since the oldest job that has not ended was submitted.")
        ended = CounterMetricFamily(
            PREFIX + "job_items", "Items that have ended in this gateway's life.", labels=["model_name", "outcome"]
        )
        if (numbers := self.numbers) is not None:
            name = self._model_name()
            for status in JobStatus:
                states.add_metric([name, status], numbers.by_status.get(status, 0))
            left.add_metric([name], numbers.num_left)
            age.add_metric([name], numbers.oldest_age_s)
            ended.add_metric([name, "completed"], numbers.num_completed)
            ended.add_metric([name, "failed"], numbers.num_failed)
        yield from (states, left, age, ended)

    def _gauge(self, name: str, text: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
