"""What the service counts, as Prometheus reads it. Every app has a registry of its own."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from hildanext.engine.base import Engine, RequestOutput
from hildanext.exact import ExactStats
from hildanext.jobs.service import JobService

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
PER_FORWARD = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0)


class Metrics:
    """Histograms of what was answered, counts of requests, and the engine's own totals when they are asked for."""

    def __init__(self, engine: Engine, jobs: JobService | None) -> None:
        self.registry = into = CollectorRegistry()
        by = ["by"]
        self.first_block = Histogram(
            "hilda_time_to_first_block_seconds",
            "From submission to the first final text",
            by,
            registry=into,
            buckets=SECONDS,
        )
        self.whole = Histogram(
            "hilda_request_seconds", "From submission to the end of a text", by, registry=into, buckets=SECONDS
        )
        self.queued = Histogram("hilda_queue_seconds", "In the engine's queue", by, registry=into, buckets=SECONDS)
        self.per_forward = Histogram(
            "hilda_tokens_per_forward", "Kept tokens over forwards of a text", by, registry=into, buckets=PER_FORWARD
        )
        names = ["method", "route", "status"]
        self.requests = Counter("hilda_http_requests", "Answered requests", names, registry=into)
        self.registry.register(_EngineTotals(engine, jobs))

    def answered(self, answer: RequestOutput, parent: bool) -> None:
        """A text is whole."""
        by = "parent" if parent else "exact" if isinstance(answer.stats, ExactStats) else "diffusion"
        self.first_block.labels(by).observe(answer.first_piece_seconds)
        self.whole.labels(by).observe(answer.seconds)
        self.queued.labels(by).observe(answer.queue_seconds)
        self.per_forward.labels(by).observe(answer.stats.tokens_per_forward)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineTotals(Collector):
    """Read from the engine and the table of jobs at the moment of asking."""

    def __init__(self, engine: Engine, jobs: JobService | None) -> None:
        self.engine, self.jobs = engine, jobs

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        load, facts = self.engine.load(), self.engine.facts
        hit_rate = load.cached_tokens / load.prompt_tokens if load.prompt_tokens else 0.0
        usage = load.cache_bytes / load.cache_limit_bytes if load.cache_limit_bytes else 0.0
        gauges = {
            "hilda_requests_running": ("Texts that are being written", load.running),
            "hilda_requests_waiting": ("Texts that wait for a place", load.waiting),
            "hilda_slots": ("Texts that can be written at a time", facts.slots),
            "hilda_up": ("Whether the engine lives", int(load.alive)),
            "hilda_kv_bytes": ("Keys and values of running texts and kept prefixes", load.cache_bytes),
            "hilda_kv_limit_bytes": ("Most bytes of keys and values", load.cache_limit_bytes),
            "hilda_kv_usage": ("Share of those in use", usage),
            "hilda_cache_hit_rate": ("Share of prompt tokens whose keys and values were there", hit_rate),
        }
        for name, (help_text, value) in gauges.items():
            yield GaugeMetricFamily(name, help_text, value=value)
        counters = {
            "hilda_prompt_tokens": ("Tokens of prompts", load.prompt_tokens),
            "hilda_cached_tokens": ("Tokens of prompts that another request had left", load.cached_tokens),
            "hilda_generation_tokens": ("Tokens of answers", load.generated_tokens),
            "hilda_forwards": ("Forwards of the engine; one may serve many texts", load.forwards),
            "hilda_denoising_steps": ("Forwards that texts took part in, added up", load.denoising_steps),
            "hilda_edits": ("Written tokens that were replaced", load.edits),
            "hilda_blocks": ("Finished blocks", load.blocks),
            "hilda_spec_decode_num_drafts": ("Forwards of exact mode that verified drafts", load.drafts),
            "hilda_spec_decode_num_draft_tokens": ("Tokens that were drafted", load.draft_tokens),
            "hilda_spec_decode_num_accepted_tokens": ("Drafts that the parent kept", load.accepted_tokens),
        }
        for name, (help_text, value) in counters.items():
            yield CounterMetricFamily(name, help_text, value=value)
        per_place = CounterMetricFamily(
            "hilda_spec_decode_num_accepted_tokens_per_pos",
            "Drafts that the parent kept, by place",
            labels=["position"],
        )
        for place, count in enumerate(load.accepted_per_position):
            per_place.add_metric([str(place)], count)
        yield per_place
        ended = CounterMetricFamily("hilda_texts", "Texts that have ended", labels=["reason"])
        for reason, count in load.finished.items():
            ended.add_metric([reason], count)
        yield ended
        if self.jobs is not None:
            yield _states(self.jobs)


def _states(jobs: JobService) -> Metric:
    gauge = GaugeMetricFamily("hilda_jobs", "Jobs by state", labels=["state"])
    for state, count in jobs.counts().items():
        gauge.add_metric([state], count)
    return gauge
