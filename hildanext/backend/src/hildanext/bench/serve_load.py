"""Load on a running service: many clients at once, what they waited for, what they got, what went wrong.

Closed loop: so many clients, each asks again as soon as it has its answer. Open loop: requests arrive at random times
(Poisson) whether or not the earlier ones are done, and waiting counts from the moment of arrival. Any server that
streams /v1/completions can be measured; a HILDA one tells forwards, too.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from pydantic import Field
from rich.table import Table

from hildanext.core.config import Seed, config, plain
from hildanext.core.errors import ConfigError, HildaError
from hildanext.core.runtime import cpu_name, usable_cores
from hildanext.data.chat_template import Message
from hildanext.data.prompts import Prompt, read_prompts
from hildanext.engine.base import EngineFailed, Request, RequestOutput
from hildanext.engine.remote.dialects import Published, Times
from hildanext.engine.remote.http import (
    ServerInfo,
    SSEDecoder,
    address_of,
    key_header,
    probe_server,
    refusal,
    unreachable,
)

WORDS = (
    "once upon a time there was little girl boy dog cat who had big red ball and wanted to play in the park with "
    "her friend but it began rain so they went home mother said let us make cake happy together sun came out bird "
    "tree house road water found small box under bed opened saw key ran fast laughed"
).split()
CANCELLED = "cancelled by the client"
PERCENTILES = (50, 90, 99)


@config
class ServeLoadConfig:
    """The load. The same seed gives the same prompts, arrivals and disconnects."""

    clients: int = Field(default=4, ge=1, le=1024)
    """Closed loop: requests that are open at the same time."""
    rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Open loop: mean arrivals per second; None: closed loop."""
    most_open: int = Field(default=512, ge=1, le=4096)
    """Open loop: arrivals beyond so many open requests are not sent, and counted as such."""
    requests: int = Field(default=32, ge=1)
    warmup: int = Field(default=2, ge=0)
    """Requests before the clock starts."""
    prompts_file: Path | None = None
    """Prompts to ask instead of made ones (see `prompt_file`), one after the other and then again from the first."""
    prompt_words: tuple[int, int] = (5, 60)
    """Fewest and most words of a made prompt."""
    shared_words: int = Field(default=0, ge=0)
    """Words that all prompts begin with, so that a cache of prefixes has something to do."""
    max_new_tokens: int = Field(default=64, ge=1)
    ignore_eos: bool = False
    """HILDA servers: every text is as long as it may be."""
    cancel_rate: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of requests whose client goes away."""
    cancel_seconds: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """It goes within so many seconds, uniformly."""
    deadline_seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """HILDA servers: sent with every request."""
    silence_seconds: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    """A server that is silent for so long is given up."""
    fields: dict[str, Any] = Field(default_factory=dict)
    """More fields of every body, as {"mode": "Q_MODE"}."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        least, most = self.prompt_words
        if not 1 <= least <= most:
            raise ConfigError(f"prompt_words {list(self.prompt_words)}", "give the fewest and the most, at least 1")
        if self.prompts_file is not None and self.shared_words:
            raise ConfigError("prompts_file and shared_words", "prompts of a file begin as they do: leave one out")


@dataclass(frozen=True)
class Plan:
    """One request before it is sent."""

    prompt: Prompt
    seed: int
    arrival: float
    """Seconds from the start on; 0 in a closed loop."""
    leaves: float | None
    """Seconds after which its client goes away; None: it stays."""


@dataclass(frozen=True)
class Outcome:
    """What became of a request: an answer with the usage that came with it, or the kind of what went wrong."""

    answer: RequestOutput | None
    usage: dict[str, Any]
    kind: str = ""
    message: str = ""


def plans(settings: ServeLoadConfig) -> Iterator[Plan]:
    """The requests, those for warming up first. Raises `DataError` for a file of prompts that cannot be read."""
    draw = random.Random(settings.seed)
    shared = [draw.choice(WORDS) for _ in range(settings.shared_words)]
    from_file = read_prompts(settings.prompts_file) if settings.prompts_file is not None else None
    arrival = 0.0
    for number in range(settings.warmup + settings.requests):
        words = shared + [draw.choice(WORDS) for _ in range(draw.randint(*settings.prompt_words))]
        made = Prompt(number + 1, text=" ".join(words).capitalize())
        leaves = draw.uniform(0.0, settings.cancel_seconds) if draw.random() < settings.cancel_rate else None
        prompt = made if from_file is None else from_file[(number - settings.warmup) % len(from_file)]
        yield Plan(prompt, settings.seed + number, arrival, leaves)
        if settings.rate is not None and number >= settings.warmup:
            arrival += draw.expovariate(settings.rate)


def measure(
    url: str,
    loads: Sequence[ServeLoadConfig],
    model: str | None = None,
    parent: str | None = None,
    api_key_env: str | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Load a server's model, and then its parent with the same requests; so for each of the loads, in their order.

    `model` None is the server's first; `parent` "auto" the one that a HILDA server tells. Raises `ConfigError`,
    `ModelError` and `EngineFailed` where there is no such server or model, `DataError` for prompts that are none.
    """
    address, headers = address_of(url), key_header(api_key_env)
    measured = []
    with httpx.Client(base_url=address, headers=headers, timeout=30.0) as client:
        server = probe_server(client, address, model, parent)
        for settings in loads:
            if not server.hilda and (settings.deadline_seconds is not None or settings.ignore_eos):
                raise ConfigError(f"{address} is not a HILDA server", "leave deadline_seconds and ignore_eos out")
        for settings in loads:
            results = {}
            for role, name in (("model", server.model), ("parent", server.parent)):
                if name is not None:
                    results[role] = _loaded(client, server, name, settings, say)
            loop = "closed" if settings.rate is None else "open"
            measured.append({"loop": loop, "settings": plain(settings), "results": results})
    facts = {key: server.hilda.get(key) for key in ("engine", "device", "dtype", "threads", "versions")}
    return {
        "bench": "serve",
        "url": address,
        "server": facts if server.hilda else None,
        "client": {"cpu": cpu_name(), "cores": usable_cores()},
        "loads": measured,
    }


def _loaded(
    client: httpx.Client, server: ServerInfo, name: str, settings: ServeLoadConfig, say: Callable[[str], None] | None
) -> dict[str, Any]:
    """What one load does to one model."""
    loading = _Loading(str(client.base_url).rstrip("/"), client.headers, name, settings)
    asyncio.run(loading.warm())
    before = _engine_counts(client) if server.hilda else {}
    outcomes, seconds = asyncio.run(loading.run())
    after = _engine_counts(client) if server.hilda else {}
    grown = {key: after[key] - before[key] for key in before if key in after}
    if say is not None:
        say(f"{name}, {load_of(settings.clients, settings.rate)}: {len(outcomes)} requests in {seconds:.1f} s")
    return {"name": name, **summary(outcomes, seconds), "engine_counts": grown}


def load_of(clients: int, rate: float | None) -> str:
    """How the requests come, in a few words."""
    if rate is not None:
        return f"open loop, {rate:g} arrivals/s"
    return f"closed loop, {clients} client{'s' * (clients != 1)}"


def _engine_counts(client: httpx.Client) -> dict[str, int]:
    """Counts of the whole service, whoever else it serves; nothing where it does not answer any more."""
    try:
        load = client.get("/health").json()["load"]
        return {key: int(load[key]) for key in ("forwards", "denoising_steps", "generated_tokens", "cached_tokens")}
    except (httpx.HTTPError, ValueError, LookupError, TypeError):
        return {}


class _Loading:
    """One model's load."""

    def __init__(self, address: str, headers: Mapping[str, str], model: str, settings: ServeLoadConfig) -> None:
        self.address, self.headers, self.model, self.settings = address, headers, model, settings
        self.open = 0

    async def warm(self) -> None:
        """Send the requests that do not count, one after the other."""
        async with self._client() as client:
            for plan in islice(plans(self.settings), self.settings.warmup):
                await self._one(client, plan, time.perf_counter(), stays=True)

    async def run(self) -> tuple[list[Outcome], float]:
        """The outcomes of the requests that count, and the seconds they took together."""
        counted = list(plans(self.settings))[self.settings.warmup :]
        async with self._client() as client:
            begun = time.perf_counter()
            if self.settings.rate is None:
                outcomes = await self._closed(client, counted)
            else:
                outcomes = await self._arriving(client, counted, begun)
            return outcomes, time.perf_counter() - begun

    def _client(self) -> httpx.AsyncClient:
        timeout = httpx.Timeout(self.settings.silence_seconds, connect=10.0)
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(base_url=self.address, headers=self.headers, timeout=timeout, limits=limits)

    async def _closed(self, client: httpx.AsyncClient, counted: list[Plan]) -> list[Outcome]:
        left, outcomes = iter(counted), list[Outcome]()

        async def one_client() -> None:
            for plan in left:  # shared: whoever is free takes the next
                outcomes.append(await self._one(client, plan, time.perf_counter()))

        await asyncio.gather(*(one_client() for _ in range(min(self.settings.clients, len(counted)))))
        return outcomes

    async def _arriving(self, client: httpx.AsyncClient, counted: list[Plan], begun: float) -> list[Outcome]:
        async def one(plan: Plan) -> Outcome:
            due = begun + plan.arrival
            await asyncio.sleep(max(due - time.perf_counter(), 0.0))
            if self.open >= self.settings.most_open:
                return Outcome(None, {}, "not sent", f"{self.open} requests were open")
            return await self._one(client, plan, due)

        return list(await asyncio.gather(*(one(plan) for plan in counted)))

    async def _one(self, client: httpx.AsyncClient, plan: Plan, due: float, stays: bool = False) -> Outcome:
        self.open += 1
        leaves = None if stays else plan.leaves
        turns = tuple(Message(role, content) for role, content in plan.prompt.messages)
        request = Request(
            prompt=plan.prompt.text, messages=turns, seed=plan.seed, max_new_tokens=self.settings.max_new_tokens
        )
        talk = Published(request, Times(due, due))
        try:
            async with asyncio.timeout(leaves):
                answer = await self._talk(client, talk)
            return Outcome(answer, dict(talk.usage))
        except TimeoutError:
            return Outcome(None, {}, CANCELLED)
        except httpx.HTTPError as problem:
            return Outcome(None, {}, "cut off or silent", str(unreachable(self.address, problem)))
        except HildaError as error:
            return Outcome(None, {}, type(error).__name__, str(error))
        finally:
            self.open -= 1

    async def _talk(self, client: httpx.AsyncClient, talk: Published) -> RequestOutput:
        settings = self.settings
        body = talk.body(self.model, (), usage=True)
        more = {"deadline_seconds": settings.deadline_seconds} if settings.deadline_seconds is not None else {}
        body |= {**more, **({"ignore_eos": True} if settings.ignore_eos else {}), **settings.fields}
        async with client.stream("POST", talk.path, json=body) as response:
            if response.status_code != 200:
                raise refusal(response.status_code, response.headers, (await response.aread())[:65536])
            reader = SSEDecoder()
            async for arrived in response.aiter_bytes():
                for event in reader.feed(arrived):
                    talk.take(event)
                    if talk.answer is not None:
                        return talk.answer
        raise EngineFailed("the stream ended before the text", "see the server's log")


def summary(outcomes: list[Outcome], seconds: float) -> dict[str, Any]:
    """Counts, rates and percentiles; those of times are over whole answers only, None where there are none."""
    done = [outcome for outcome in outcomes if outcome.answer is not None]
    answers = [outcome.answer for outcome in done if outcome.answer is not None]
    tokens = sum(len(answer.tokens) for answer in answers)
    details = [outcome.usage.get("completion_tokens_details") or {} for outcome in done]
    forwards = sum(int(detail.get("forward_passes") or 0) for detail in details)
    steps = sum(int(detail.get("denoising_steps") or 0) for detail in details)
    errors = Counter(outcome.kind for outcome in outcomes if outcome.kind)
    examples = {outcome.kind: outcome.message for outcome in outcomes if outcome.message}
    return {
        "requests": len(outcomes),
        "answered": len(done),
        "seconds": seconds,
        "requests_per_second": len(done) / seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "cached_tokens": sum(answer.cached_tokens for answer in answers),
        "first_block_seconds": _percentiles([answer.first_piece_seconds for answer in answers if answer.text]),
        "latency_seconds": _percentiles([answer.seconds for answer in answers]),
        "forwards": forwards or None,
        "denoising_steps": steps or None,
        "tokens_per_forward": tokens / forwards if forwards else None,
        "finish_reasons": dict(Counter(answer.finish_reason for answer in answers)),
        "errors": dict(errors),
        "error_examples": examples,
    }


def _percentiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    points = {f"p{share}": float(np.percentile(values, share)) for share in PERCENTILES}
    return {"mean": float(np.mean(values)), **points, "max": max(values)}


def tables(result: dict[str, Any]) -> list[Table]:
    """One table for each load, with one column for each model."""
    return [_table(result["url"], load) for load in result["loads"]]


def _table(url: str, load: dict[str, Any]) -> Table:
    results, settings = load["results"], load["settings"]
    volume = f"{settings['requests']} requests of {settings['max_new_tokens']} tokens"
    title = f"{url}, {load_of(settings['clients'], settings['rate'])}, {volume}"
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for role, result in results.items():
        table.add_column(f"{result['name']} ({'AR parent' if role == 'parent' else 'model'})", justify="right")

    def row(words: str, show: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(words, *(show(result) for result in results.values()))

    row("answered", lambda result: f"{result['answered']} of {result['requests']}")
    row("tokens/s", lambda result: f"{result['tokens_per_second']:.1f}")
    row("requests/s", lambda result: f"{result['requests_per_second']:.2f}")
    for key, words in (("first_block_seconds", "first block"), ("latency_seconds", "whole answer")):
        for share in PERCENTILES:
            row(f"{words} p{share}, s", lambda result, key=key, share=share: _number(result[key], f"p{share}"))  # type: ignore[misc]
    row("tokens per forward", lambda result: _number(result, "tokens_per_forward"))
    row("forwards of requests", lambda result: str(result["forwards"] or "not told"))
    row("forwards of the engine", lambda result: str(result["engine_counts"].get("forwards", "not told")))
    row("prompt tokens from the cache", lambda result: f"{result['cached_tokens']} of {result['prompt_tokens']}")
    for kind in sorted({kind for result in results.values() for kind in result["errors"]}):
        row(kind, lambda result, kind=kind: str(result["errors"].get(kind, 0)))  # type: ignore[misc]
    return table


def _number(percentiles: dict[str, Any] | None, key: str) -> str:
    value = percentiles.get(key) if percentiles is not None else None
    return f"{value:.3f}" if value is not None else "not told"
