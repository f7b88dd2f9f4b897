"""Figures in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

__all__ = ["CONTENT_TYPE", "exposition"]


class _Figures(Collector):
    def __init__(self, figures: Mapping[str, float], answers: Mapping[tuple[str, int], int]) -> None:
        self._figures, self._answers = figures, answers

    def collect(self) -> Iterator[Metric]:
        for name, value in self._figures.items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield kind(f"deltasync_{name}", name.replace("_", " "), value=value)
        answers = CounterMetricFamily("deltasync_http_answers", "answers given", labels=("method", "status"))
        for (method, status), count in self._answers.items():
            answers.add_metric((method, str(status)), count)
        yield answers


def exposition(figures: Mapping[str, float], answers: Mapping[tuple[str, int], int]) -> bytes:
    """Return the figures of the store and the answers by method and status; a name in _total is a counter."""
    registry = CollectorRegistry()
    registry.register(_Figures(figures, answers))
    return generate_latest(registry)
