"""What Prometheus scrapes. One registry an app; every label comes from a fixed set or from the home's own names.

A user's text, a model name that does not exist or a request id never becomes a label: ten thousand wrong names make no
series.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hybrid.engine.breaker import STATES
from hybrid.types import JSON
from hybrid.types.decision import Decision

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
_SLOW = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_REASONS = ("deadline", "error", "abstained")


class Metrics:
    """The instruments of one app. `status` is `Gateway.status`, read at each scrape."""

    def __init__(self, status: Callable[[], JSON]) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter(
            "hybrid_requests_total", "Requests, by route and status.", ["route", "code"], registry=r
        )
        self.rejected = Counter("hybrid_rejected_total", "Refused at the door, by reason.", ["reason"], registry=r)
        self.inflight = Gauge("hybrid_inflight", "API requests being answered.", registry=r)
        self.overhead = Histogram(
            "hybrid_overhead_seconds", "Time a request spends in the gateway itself.", buckets=_FAST, registry=r
        )
        self.gate = Histogram("hybrid_gate_seconds", "Time of one gate decision.", buckets=_FAST, registry=r)
        self.fallback = Counter(
            "hybrid_gate_fallback_total", "Decisions not taken by the gate's scores.", ["reason"], registry=r
        )
        self.retrieval = Histogram("hybrid_retrieval_seconds", "Time of one search.", buckets=_FAST, registry=r)
        self.ttft = Histogram(
            "hybrid_upstream_ttft_seconds", "Time to the engine's first token.", buckets=_SLOW, registry=r
        )
        for reason in _REASONS:  # a series that exists at zero can be alerted on
            self.fallback.labels(reason)
        r.register(_Home(status))

    def decided(self, decision: Decision) -> None:
        """Counts a decision."""
        if decision.chosen_by != "caller":
            self.gate.observe(decision.route_ms / 1000)
        if decision.fallback is not None:
            self.fallback.labels(decision.fallback if decision.fallback in _REASONS else "other").inc()

    def render(self) -> bytes:
        """The text Prometheus reads."""
        return generate_latest(self.registry)


class _Home(Collector):
    """What the home holds, asked when scraped: never stale, nothing to keep in step."""

    def __init__(self, status: Callable[[], JSON]) -> None:
        self._status = status

    def describe(self) -> list[Metric]:
        """Nothing is asked at registration."""
        return []

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        restarts = GaugeMetricFamily("hybrid_engine_restarts_total", "Restarts of the engine by its supervisor.")
        restarts.add_metric([], status["engine"]["restarts"])
        ready = GaugeMetricFamily("hybrid_engine_ready", "1 when the engine can answer.")
        ready.add_metric([], float(status["engine"]["ready"]))
        breaker = GaugeMetricFamily("hybrid_engine_breaker", "1 for the state the breaker is in.", None, ["state"])
        for state in STATES:
            breaker.add_metric([state], float(status["engine"]["breaker"] == state))
        refused = CounterMetricFamily(
            "hybrid_engine_retries_refused", "Retries to reach the engine that the budget refused."
        )
        refused.add_metric([], status["engine"]["retries_refused"])
        adapters = GaugeMetricFamily(
            "hybrid_adapter_state", "Adapter versions and their states.", None, ["adapter", "state"]
        )
        for adapter in status["adapters"]:
            adapters.add_metric([f"{adapter['name']}@{adapter['version']}", adapter["state"]], 1)
        index = GaugeMetricFamily("hybrid_index_generation", "Published generation of a corpus.", None, ["corpus"])
        for corpus in status["corpora"]:
            index.add_metric([corpus["name"]], float(corpus["generation"] or 0))
        jobs = GaugeMetricFamily("hybrid_job_state", "Recent jobs, by status.", None, ["state"])
        states = [job["status"] for job in status["jobs"]]
        for state in sorted(set(states)):
            jobs.add_metric([state], states.count(state))
        yield from (restarts, ready, breaker, refused, adapters, index, jobs)
