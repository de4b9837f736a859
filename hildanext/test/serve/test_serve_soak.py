"""A thousand requests, many given up, cut off or out of time: nothing leaks, nothing sticks, nothing lies."""

import asyncio
import gc
import json
import random
from collections import Counter

import httpx
import psutil
import pytest

from hildanext.decoding import decoder_section, make_decoder
from hildanext.engine.local import LocalEngineConfig
from hildanext.inference import GenerationConfig, generate
from hildanext.serve.settings import ServeConfig
from hildanext.tokenization import encode_prompt
from serving import events, live

pytestmark = pytest.mark.slow

REQUESTS = 1000
CLIENTS = 24
PROMPTS = ["Once upon a time", "Tom and Mia went to the park. They", "The big red dog was sad because"]
WAYS = [{"mode": "S_MODE"}, {"mode": "Q_MODE"}, {"mode": "S_MODE", "tau_edit": None}]


def decoding_params(engine) -> dict[tuple[int, int, int], str]:
    """What the bare loop writes for each prompt, way and length."""
    texts = {}
    for p, prompt in enumerate(PROMPTS):
        ids = encode_prompt(engine.tokenizer, prompt)
        for w, way in enumerate(WAYS):
            changes = {key: value for key, value in way.items() if key != "mode"}
            decoder = make_decoder(decoder_section(way["mode"], **changes))
            for new in (8, 24, 40):
                done = generate(engine.model, engine.tokenizer, [ids], decoder, GenerationConfig(max_new_tokens=new))
                texts[p, w, new] = done[0].text
    return texts


async def one(client: httpx.AsyncClient, number: int, right: dict[tuple[int, int, int], str]) -> str:
    """Ask once, in one of five ways; what came of it. Raises where an answer is wrong."""
    draw = random.Random(number)
    key = (draw.randrange(len(PROMPTS)), draw.randrange(len(WAYS)), draw.choice((8, 24, 40)))
    body = {"prompt": PROMPTS[key[0]], "max_new_tokens": key[2], **WAYS[key[1]]}
    kind = draw.choice(("whole", "whole", "stream", "leave", "deadline"))
    if kind == "leave":
        try:
            await client.post("/generate", json=body, timeout=draw.uniform(0.005, 0.3))
        except httpx.TimeoutException:
            return "left"
        return "whole"
    if kind == "deadline":
        answer = await client.post("/generate", json={**body, "deadline_seconds": draw.choice((0.02, 0.2))})
        if answer.status_code == 504:
            return "deadline"
    elif kind == "stream":
        async with client.stream("POST", "/generate/stream", json=body) as answer:
            if draw.random() < 0.5:
                async for _ in answer.aiter_lines():
                    return "cut"
            text = (await answer.aread()).decode()
        if answer.status_code == 200:
            name, data = events(text)[-1]
            assert name == "done" and data["text"] == right[key], (name, data, key)
            return "streamed"
    else:
        answer = await client.post("/generate", json=body)
    if answer.status_code == 503:
        assert float(answer.headers["retry-after"]) > 0
        await asyncio.sleep(0.2)
        return "refused"
    assert answer.status_code == 200, answer.text
    assert json.loads(answer.text)["text"] == right[key], key
    return "whole"


async def load(address: str, numbers: range, right: dict[tuple[int, int, int], str]) -> Counter[str]:
    queue = list(numbers)
    ended: Counter[str] = Counter()

    async def client() -> None:
        async with httpx.AsyncClient(base_url=address, timeout=120) as http:
            while queue:
                ended[await one(http, queue.pop(), right)] += 1

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return ended


async def quiet(engine) -> None:
    for _ in range(600):
        if not engine.load().running + engine.load().waiting:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"still there: {engine.load()}")


def test_a_thousand_requests_leave_nothing_behind():
    engine = LocalEngineConfig(threads=1, dtype="fp32", slots=6, queue=12, cache_mib=64).open("tiny", None, "a test")
    right = decoding_params(engine)
    process = psutil.Process()
    with live(ServeConfig(port=0, jobs_folder=None), engine) as address:
        ended = asyncio.run(load(address, range(0, REQUESTS // 4), right))
        asyncio.run(quiet(engine))
        gc.collect()
        before = process.memory_info().rss
        ended += asyncio.run(load(address, range(REQUESTS // 4, REQUESTS), right))
        asyncio.run(quiet(engine))
        gc.collect()
        after = process.memory_info().rss
        state = engine.load()
    print(f"{dict(ended)}; {before / 2**20:.0f} MiB after a quarter, {after / 2**20:.0f} at the end; {state}")
    assert sum(ended.values()) == REQUESTS and min(ended[kind] for kind in ("whole", "streamed", "left", "cut")) > 20
    assert after < 1.05 * before
    assert (state.running, state.waiting) == (0, 0) and not engine.diffusion.session.rows
    assert state.cache_bytes == engine.prefixes.bytes <= engine.limit_bytes
    assert state.finished["error"] == 0 and state.finished["cancelled"] > 20
