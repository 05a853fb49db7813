"""What Prometheus would read."""

import socket
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

Samples = dict[tuple[str, ...], float]  # (name, label value, ...) without the model's name


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def parse(text: str, *, model_name: str) -> Samples:
    """All samples; each must carry the model's name."""
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == model_name, sample
            samples[sample.name, *labels.values()] = sample.value
    return samples


def scrape(port: int, *, model_name: str) -> Samples:
    return parse(fetch(f"http://127.0.0.1:{port}/metrics").decode(), model_name=model_name)


def fetch(url: str) -> bytes:
    """Reads a URL of this machine without the environment's proxies. Raises urllib.error.HTTPError."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url, timeout=30) as answer:
        return bytes(answer.read())
