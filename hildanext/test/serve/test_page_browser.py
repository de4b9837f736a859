"""The page in a real Chromium before the real service: what a person does, with eyes, fingers or keys alone."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from exact_stubs import tiny_drafts
from hildanext.decoding import DECODERS
from hildanext.engine.local import LocalEngineConfig
from hildanext.serve.settings import ServeConfig
from serving import live
from toy_decoder import Toy

pytestmark = pytest.mark.slow

CHROMIUM = os.environ.get("HILDA_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
KEY = "correct-horse"
PATIENCE = 60_000
"""Milliseconds: machines that test are busy."""

Browser = Any
Page = Any


class Server:
    """`hildanext serve` as a process of its own, at a free port: the embedded model and its parent."""

    def __init__(self, folder: Path, *flags: str, **environment: str) -> None:
        command = [sys.executable, "-m", "hildanext.cli", "serve", "--port", "0"]
        command += ["--threads", "1", "--jobs-folder", str(folder / "jobs"), *flags]
        with (folder / "serve.log").open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **environment}
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = re.match(r"(http://\S+) serves", line)
        assert match, line + (folder / "serve.log").read_text()
        self.url = match[1] + "/"

    def stop(self) -> None:
        assert self.process.stdout is not None
        self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
    )
    if CHROMIUM is None:
        pytest.skip("no chromium on the path; HILDA_CHROMIUM may name one")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("served"))
    yield server
    server.stop()


class PageSession:
    """A page, and what it should not do: complain, fail, or ask elsewhere. `refusals` are expected 4xx answers."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.url, self.refusals = url, 0
        self.complaints: list[str] = []
        self.elsewhere: list[str] = []
        self.context = browser.new_context(**{"viewport": {"width": 1240, "height": 900}, **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._asked)

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((self.url, "blob:")):
            self.elsewhere.append(request.url)

    def open(self, hash: str = "") -> Page:
        self.page.goto(self.url + hash)
        return self.page

    def close(self) -> None:
        expected = [text for text in self.complaints if text.startswith("Failed to load resource")]
        self.context.close()
        assert self.elsewhere == []
        assert [text for text in self.complaints if text not in expected] == []
        assert len(expected) <= self.refusals, expected


@pytest.fixture
def session(browser: Browser, server: Server) -> Iterator[PageSession]:
    session = PageSession(browser, server.url)
    yield session
    session.close()


@pytest.fixture
def page(session: PageSession) -> Page:
    return session.open()


WATCH = """() => {
  window.seen = [];
  const canvas = document.getElementById("diffusion-canvas");
  new MutationObserver(() => seen.push({
    masks: canvas.querySelectorAll(".token.mask").length, drafts: canvas.querySelectorAll(".token.draft").length,
    final: canvas.querySelectorAll(".token.committed").length, edited: canvas.querySelectorAll(".token.edited").length,
  })).observe(canvas, { childList: true, subtree: true, attributes: true });
}"""


def write(page: Page, side: str = "diffusion") -> None:
    page.click("#start")
    page.wait_for_selector(f"#{side}-sheet[data-state=done]")


def until(page: Page, expression: str) -> None:
    """Wait until an expression holds. (Playwright's own way needs `eval`, which the page's policy forbids.)"""
    end = time.monotonic() + PATIENCE / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"never: {expression}"
        page.wait_for_timeout(20)


def counts(page: Page, state: str, side: str = "diffusion") -> int:
    return int(page.locator(f"#{side}-canvas .token.{state}").count())


def scrub(page: Page, index: int) -> None:
    page.evaluate(
        "at => { const slider = document.getElementById('scrub'); slider.value = at;"
        " slider.dispatchEvent(new Event('input')); }",
        index,
    )


def figures(page: Page, side: str) -> dict[str, str]:
    rows = page.locator(f"#{side}-figures > div").all()
    return {row.locator("dt").inner_text(): row.locator("dd").inner_text() for row in rows}


def asked_by(page: Page) -> list[Any]:
    """Bodies of the texts that the page asks for from now on."""
    asked: list[Any] = []
    page.on("request", lambda request: asked.append(request.post_data_json) if "stream" in request.url else None)
    return asked


def text_of(page: Page, side: str = "diffusion") -> str:
    """What was written, without the marks of line breaks and of the beginning of text."""
    tokens = page.locator(f"#{side}-canvas .token:not(.prompt):not(.special)").all_inner_texts()
    return "".join(tokens).replace("↵", "")


def test_a_text_is_written_while_one_watches(page: Page):
    page.wait_for_selector(".status.up")
    assert counts(page, "mask") == 8, "before anything is written, a block of hidden positions shows what will come"
    page.evaluate(WATCH)
    write(page)
    seen = page.evaluate("seen")
    masks = [now["masks"] for now in seen]
    falls = sum(one > other for one, other in zip(masks, masks[1:], strict=False))
    assert falls >= 10 and masks[-1] == 0
    assert any(now["drafts"] for now in seen) and seen[-1]["final"] > 50
    final = [now["final"] for now in seen]
    assert len(set(final)) >= 8, "blocks become final one after another"
    assert counts(page, "committed") == int(figures(page, "diffusion")["tokens"])
    assert figures(page, "diffusion")["tokens/s"] != "–"
    assert "Done" in page.locator("#announce").inner_text()


def test_the_canvas_holds_what_the_service_answers(session: PageSession, page: Page):
    write(page)
    body = {"prompt": "Once upon a time", "max_new_tokens": 96, "mode": "S_MODE"}
    answer = session.context.request.post(session.url + "generate", data=body).json()
    assert text_of(page).split() == answer["text"].split()
    shown = figures(page, "diffusion")
    assert shown["forwards"] == str(answer["usage"]["forward_passes"])
    assert shown["edits"] == str(answer["usage"]["edited_tokens"])


def test_one_scrubs_steps_and_plays_what_was_written(page: Page):
    write(page)
    last = int(page.get_attribute("#scrub", "max"))
    whole, written = text_of(page), figures(page, "diffusion")
    scrub(page, 0)
    assert counts(page, "committed") == counts(page, "draft") == counts(page, "mask") == 0
    masks = []
    for index in (1, 2, 3):
        page.click("#ahead")
        masks.append(counts(page, "mask"))
        assert page.locator("#moment").inner_text().startswith(f"{index} of {last} ")
    assert masks[0] > masks[-1]
    before = counts(page, "draft") + counts(page, "committed")
    told = figures(page, "diffusion")
    assert (told["forwards"], told["tokens"]) == ("3", str(before + counts(page, "edited")))
    assert told["tokens per forward"] == f"{int(told['tokens']) / 3:.2f}"
    page.click("#back")
    assert figures(page, "diffusion")["forwards"] == "2"
    assert counts(page, "draft") + counts(page, "committed") <= before
    scrub(page, last)
    assert text_of(page) == whole and figures(page, "diffusion") == written
    assert counts(page, "was-edited") > 0, "the finished text shows where it was edited"
    page.select_option("#speed", "2")
    page.click("#play")
    until(page, f"document.getElementById('scrub').value === '{last}'")
    until(page, "document.getElementById('play').textContent === 'Play'")
    assert text_of(page) == whole


SAME_PICTURES = """async ({ frames, prompt }) => {
  const { Recording } = await import("/static/recording.js");
  const filled = () => {
    const made = new Recording();
    made.setPrompt([{ position: prompt - 1, text: "prompt" }]);
    for (const frame of frames) made.addStep(frame, frame.seconds);
    return made;
  };
  const scrubbed = filled();
  const picture = (recording, count) => JSON.stringify(recording.at(count));
  const wrong = [];
  for (let step = 0; step < frames.length; step += 1) {
    const count = step * 37 % (frames.length + 1);
    if (picture(scrubbed, count) !== picture(filled(), count)) wrong.push(count);
  }
  const states = scrubbed.at(frames.length).map((one) => one.state);
  const revised = frames.findIndex((frame) => frame.kind === "revise" && frame.edits.length > 0);
  const at = frames[revised]?.edits[0].position;
  const then = (count) => scrubbed.at(count).find((one) => one.position === at).state;
  return { wrong, states, revised: revised < 0 ? null : [then(revised), then(revised + 1), then(revised + 2)] };
}"""


HALVES = """async () => {
  const { Recording } = await import("/static/recording.js");
  const made = new Recording();
  made.setPrompt([{ position: 0, text: "p" }]);
  const draft = (position, bytes) => ({ position, text: "\ufffd", bytes, probability: 0.5 });
  const step = { forward: 1, kind: "denoise", block_start: 1, edits: [], final: false };
  made.addStep({ ...step, masks: [1, 2, 3], drafts: [draft(1, [0xf0]), draft(3, [0xa6, 0x8a])] }, 1);
  made.addStep({ ...step, masks: [2], drafts: [draft(2, [0x9f])] }, 2);
  return made.at(2).map((one) => one.text);
}"""


def test_a_character_of_several_tokens_is_drawn_whole(session: PageSession, page: Page):
    assert page.evaluate(HALVES) == ["p", "", "", "🦊"]


def test_any_moment_looks_the_same_however_one_came_to_it(session: PageSession, page: Page):
    body = {"prompt": "Once upon a time", "max_new_tokens": 96, "window": 2, "frames": True}
    answer = session.context.request.post(session.url + "generate", data=body).json()
    compared = page.evaluate(SAME_PICTURES, {"frames": answer["frames"], "prompt": answer["usage"]["prompt_tokens"]})
    assert compared["wrong"] == []
    assert set(compared["states"]) == {"prompt", "committed"}
    assert compared["revised"] == ["committed", "edited", "committed"], "an edit of a finished block shows for a moment"


IN_WORDS = """async (texts) => {
  const { describe, Recording } = await import("/static/recording.js");
  return texts.map((text) => {
    const made = new Recording();
    made.addStep({ forward: 1, kind: "denoise", block_start: 0, masks: [], edits: [], final: false,
      drafts: [{ position: 0, text, probability: 0.5 }] }, 0);
    return describe(made.at(1)[0]);
  });
}"""


def test_the_end_of_text_is_told_as_a_mark_and_not_as_a_word(page: Page):
    marks = page.evaluate(IN_WORDS, ["<|endoftext|>", "</s>", "<b", " a<|x|>"])
    assert [said.startswith("the mark ") for said in marks] == [True, True, False, False]


def test_the_player_stays_where_it_is_while_it_plays(page: Page):
    write(page)
    place = page.locator("#play").bounding_box()
    scrub(page, 2)
    assert page.locator("#play").bounding_box() == place


def test_a_token_tells_its_probability_under_pointer_and_keys(page: Page):
    write(page)
    page.locator("#diffusion-canvas .token.committed .ink").nth(3).hover()
    assert re.search(r"“.+”, (filled|edited) in forward \d+, probability [01]\.\d\d", page.locator("#tip").inner_text())
    page.mouse.move(5, 5)
    assert page.locator("#tip").is_hidden()
    page.focus("#diffusion-canvas")
    page.keyboard.press("ArrowRight")
    first = page.locator("#readout").inner_text()
    page.keyboard.press("ArrowRight")
    assert "probability" in first and page.locator("#readout").inner_text() != first
    page.keyboard.press("End")
    assert page.locator(".token.active").count() == 1
    page.locator("#diffusion-canvas .token.was-edited .ink").first.hover()
    assert "; was “" in page.locator("#tip").inner_text()


def test_the_parent_runs_after_the_model_and_both_are_timed(page: Page):
    asked = asked_by(page)
    page.check("#compare")
    write(page, "parent")
    assert [body.get("parent", False) for body in asked] == [False, True]
    times = page.evaluate(
        "performance.getEntriesByType('resource').filter((one) => one.name.endsWith('/generate/stream'))"
        ".map((one) => [one.startTime, one.responseEnd])"
    )
    assert times[1][0] >= times[0][1] > 0, "the parent is asked when the model's answer has ended"
    ours, theirs = figures(page, "diffusion"), figures(page, "parent")
    assert theirs["tokens per forward"] == "1.00" or float(theirs["tokens per forward"]) > 0.9
    assert "edits" in ours and "edits" not in theirs
    assert float(ours["tokens/s"]) > 0 and float(theirs["tokens/s"]) > 0
    assert re.match("This once the .* times as fast as the", page.locator("#verdict").inner_text())
    scrub(page, int(page.get_attribute("#scrub", "max")) // 2)
    drawn = counts(page, "committed", "parent")
    assert 0 < drawn < int(theirs["tokens"]) and figures(page, "parent")["tokens"] == str(drawn)


def test_a_comparison_is_repeated_in_turns_and_can_be_stopped(page: Page):
    page.check("#compare")
    page.fill("#max-tokens", "8")
    write(page, "parent")
    asked: list[Any] = []
    page.on("request", lambda made: asked.append(made.post_data_json) if made.url.endswith("/generate") else None)
    page.click("#repeat")
    page.wait_for_selector("#verdict:has-text('In 5 runs each, in turns')")
    turns = [body.get("parent", False) for body in asked]
    assert turns == [False, True, True, False] * 2 + [False, True], "whoever came first comes second the next time"
    assert re.search(r"in the median \(\d+\.\d\d to \d+\.\d\d\): ", page.locator("#verdict").inner_text())
    page.fill("#max-tokens", "400")
    write(page, "parent")
    once = page.locator("#verdict").inner_text()
    page.click("#repeat")
    page.wait_for_selector("#verdict:has-text('Repeating, 1 of 5')")
    page.keyboard.press("Escape")
    page.wait_for_selector("#repeat:visible")
    assert page.locator("#verdict").inner_text() == once and page.locator("#problem").is_hidden()


VERDICTS = """async (all) => {
  const { verdictOf } = await import("/static/figures.js");
  const side = (tokensPerSecond, cached) => ({ tokensPerSecond, tokensPerForward: 1, cached });
  const pair = ([ours, theirs]) => ({ diffusion: side(ours, 8), parent: side(theirs, 0) });
  return all.map((pairs) => verdictOf(pairs.map(pair)));
}"""


def test_repeats_are_told_by_their_median_and_range_whichever_way_they_fall(page: Page):
    fast = [[30, 10], [20, 10], [90, 10]]
    slow = [[10, 20], [10, 40], [10, 30], [10, 25]]
    told = page.evaluate(VERDICTS, [fast, slow, [[30, 10], [8, 10], [12, 10]], [[0, 10]]])
    why = ": 1.00 tokens per forward against 1.00. The diffusion model had 8 tokens of the prompt in its cache."
    times = "times as fast as the"
    assert told == [
        f"In 3 runs each, in turns, the diffusion model was 3.00 {times} AR parent in the median (2.00 to 9.00){why}",
        f"In 4 runs each, in turns, the AR parent was 2.73 {times} diffusion model in the median (2.00 to 4.00){why}",
        "In 3 runs each, in turns, neither was faster every time; the diffusion model was "
        f"1.20 {times} AR parent in the median (0.80 to 3.00){why}",
        "",
    ]


def test_writing_can_be_stopped(page: Page):
    page.fill("#max-tokens", "900")
    page.click("#start")
    until(page, "document.querySelectorAll('#diffusion-canvas .token.committed').length > 8")
    page.click("#stop-run")
    page.wait_for_selector("#start:visible")
    assert page.locator("#announce").inner_text() == "Stopped."
    assert page.locator("#problem").is_hidden()
    assert page.evaluate("document.activeElement.id") == "start"
    assert int(page.get_attribute("#scrub", "max")) > 8, "what was written can be replayed"
    page.fill("#max-tokens", "16")
    write(page)


def test_a_chat_keeps_its_turns(page: Page):
    page.wait_for_selector(".status.up")
    assert page.locator("#chat-note").is_hidden()
    page.check("input[name=kind][value=chat]")
    assert "never taught to chat" in page.locator("#chat-note").inner_text()
    assert page.locator("#diffusion-canvas .token.prompt").inner_text() == "", "nothing is said yet"
    page.fill("#max-tokens", "16")
    page.click("#start")
    assert "empty" in page.locator("#problem").inner_text()
    page.fill("#prompt", "Tell me of a cat.")
    write(page)
    until(page, "document.querySelectorAll('#turns li').length === 1")
    assert page.locator("#turns").inner_text().split("\n")[-1] == "Tell me of a cat."
    answer = text_of(page)
    assert answer.strip() and answer.strip() not in page.locator("#write .composer").inner_text(), "it stands once"
    assert counts(page, "prompt") == 0, "and so does the conversation"
    asked = asked_by(page)
    page.fill("#prompt", "And then?")
    write(page)
    until(page, "document.querySelectorAll('#turns li').length === 3")
    assert answer.strip() in page.locator("#turns li.assistant").inner_text()
    assert [turn["role"] for turn in asked[0]["messages"]] == ["user", "assistant", "user"]
    page.click("#forget")
    assert page.locator("#turns li").count() == 0


def test_a_threshold_out_of_range_is_an_error_in_words(session: PageSession, page: Page):
    session.refusals = 1
    page.fill("#tau-mask", "1.7")
    page.click("#start")
    page.wait_for_selector("#problem:visible")
    said = page.locator("#problem").inner_text()
    assert "Fill a mask above" in said and "above 1" in said
    assert page.get_attribute("#tau-mask", "aria-invalid") == "true"
    page.fill("#tau-mask", "0.6")
    page.fill("#max-tokens", "16")
    write(page)
    assert page.locator("#problem").is_hidden() and page.get_attribute("#tau-mask", "aria-invalid") is None


def test_exact_mode_and_its_parent_write_the_same_text_at_two_speeds(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HILDANEXT_HOME", str(tmp_path / "home"))
    adapters = str(tiny_drafts(tmp_path / "drafts"))
    engine = LocalEngineConfig(threads=1, dtype="fp32", adapters=adapters).open("tiny", "tiny", "for a test")
    with live(ServeConfig(port=0, jobs_folder=None), engine) as address:
        session = PageSession(browser, f"{address}/")
        page = session.open()
        page.wait_for_selector(".status.up")
        asked = asked_by(page)
        page.check("input[name=mode][value=exact]")
        assert page.locator("#effort-field").is_hidden() and page.locator("#decoder-field").is_hidden()
        page.select_option("#after", "all")
        page.fill("#temperature", "0.9")
        page.fill("#max-tokens", "32")
        page.check("#compare")
        write(page, "parent")
        sampling = {"prompt": "Once upon a time", "max_new_tokens": 32, "temperature": 0.9}
        assert asked == [
            {**sampling, "mode": "exact", "decoder": {"after": "all"}},
            {**sampling, "parent": True},
        ]
        said = page.locator("#verdict").inner_text()
        assert re.match("This once the (exact mode|AR parent) was", said) and said.endswith("Both wrote the same text.")
        assert page.locator("#diffusion-name").inner_text() == "Exact mode"
        assert text_of(page) == text_of(page, "parent")
        ours = figures(page, "diffusion")
        assert re.fullmatch(r"\d+ of \d+", ours["drafts kept"]) and "drafts kept" not in figures(page, "parent")
        assert counts(page, "was-edited") == int(ours["edits"]) > 0, "the parent's edits can be seen"
        page.check("input[name=mode][value=S_MODE]")
        page.fill("#temperature", "")
        write(page)
        assert page.locator("#diffusion-name").inner_text() == "Diffusion model" and asked[2]["mode"] == "S_MODE"
        session.close()


def test_settings_reach_the_service(page: Page):
    asked = asked_by(page)
    page.check("input[name=mode][value=Q_MODE]")
    assert page.get_attribute("#tau-mask", "placeholder") == "0.7"
    page.select_option("#effort", "low")
    for field, value in (("#tau-mask", "0.4"), ("#temperature", "0.8"), ("#seed", "7"), ("#max-tokens", "24")):
        page.fill(field, value)
    page.check("#tau-edit-off")
    page.fill("#stop", "The end\n\nxyz")
    write(page)
    body = {"prompt": "Once upon a time", "max_new_tokens": 24, "mode": "Q_MODE", "effort": "low", "tau_mask": 0.4}
    body |= {"tau_edit": "off", "temperature": 0.8, "seed": 7, "stop": ["The end", "xyz"]}
    assert asked == [body]
    assert figures(page, "diffusion")["edits"] == "0"
    page.select_option("#model", "parent")
    write(page, "parent")
    shared = ("prompt", "max_new_tokens", "temperature", "seed", "stop")
    assert asked[1] == {**{name: body[name] for name in shared}, "parent": True}


def test_a_new_decoder_is_chosen_and_its_knobs_are_set(browser: Browser, monkeypatch: pytest.MonkeyPatch):
    """What the page knows of it, the service has told: its name, its text, a field for each knob."""
    monkeypatch.setitem(DECODERS, "toy", Toy)
    engine = LocalEngineConfig(threads=1).open("tiny", "tiny", "for a test")
    with live(ServeConfig(port=0), engine) as address:
        session = PageSession(browser, f"{address}/")
        page = session.open()
        asked = asked_by(page)
        page.wait_for_selector(".status.up")
        page.select_option("#decoder", "toy")
        assert page.locator("#decoder-note").inner_text() == Toy.__doc__
        assert page.locator("#presets").is_hidden() and page.locator("#tau-mask").count() == 0
        alpha = page.locator("#alpha")
        assert (alpha.get_attribute("placeholder"), alpha.get_attribute("max")) == ("0.5", "1")
        assert alpha.get_attribute("aria-description") == "How sure."
        page.fill("#alpha", "1.5")
        session.refusals = 1
        page.click("#start")
        page.wait_for_selector("#problem:has-text('is above 1')")
        page.fill("#alpha", "0.3")
        page.check("#eager")
        page.fill("#max-tokens", "16")
        write(page)
        assert asked[-1] == {
            "prompt": "Once upon a time", "max_new_tokens": 16, "decoder": {"name": "toy", "alpha": 0.3, "eager": True}
        }  # fmt: skip
        assert counts(page, "committed") == int(figures(page, "diffusion")["tokens"]) > 0 and text_of(page).strip()
        session.close()


def test_a_server_that_is_gone_is_told_and_comes_back(browser: Browser, tmp_path: Path):
    first = Server(tmp_path)
    session = PageSession(browser, first.url)
    page = session.open()
    page.wait_for_selector(".status.up")
    first.stop()
    session.refusals = 100
    page.click("#start")
    page.wait_for_selector("#problem:visible")
    assert "server does not answer" in page.locator("#problem").inner_text().lower()
    page.wait_for_selector(".status.down")
    again = Server(tmp_path, "--port", first.url.rstrip("/").rsplit(":", 1)[1])
    try:
        page.fill("#max-tokens", "16")
        write(page)
        assert page.locator("#problem").is_hidden()
    finally:
        again.stop()
    session.close()


def test_a_wrong_key_is_told_and_the_right_one_kept_in_the_tab(browser: Browser, tmp_path: Path):
    server = Server(tmp_path, "--api-key-env", "PAGE_TEST_KEY", PAGE_TEST_KEY=KEY)
    session = PageSession(browser, server.url)
    try:
        session.refusals = 3
        page = session.open()
        page.wait_for_selector("#key-drop:visible")
        page.fill("#max-tokens", "16")
        page.click("#start")
        page.wait_for_selector("#problem:visible")
        assert "key" in page.locator("#problem").inner_text().lower()
        assert page.evaluate("document.activeElement.id") == "key", "the place to enter it opens"
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        page.click("#start")
        until(page, "document.activeElement.id === 'key'")
        page.fill("#key", "clé")
        page.click("#start")
        page.wait_for_selector("#problem:has-text('a character that no key has')")
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        write(page)
        assert page.evaluate("Object.values(sessionStorage)") == [KEY]
        assert page.evaluate("Object.values(localStorage)") == []
        page.reload()
        page.fill("#max-tokens", "16")
        write(page)
    finally:
        server.stop()
    session.close()


def test_a_job_is_submitted_watched_and_its_files_are_there(session: PageSession):
    page = session.open("#jobs")
    page.click("#submit-drop summary")
    page.wait_for_selector("#job-kind option[value=sft]", state="attached")
    page.select_option("#job-kind", "sft")
    config = json.loads(page.input_value("#job-config"))
    config["chat"]["train"]["count"] = 64
    config["sft"] |= {"valid_rows": 4, "samples": {"count": 1, "max_new_tokens": 8}}
    page.fill("#job-config", json.dumps(config))
    page.click("#submit button[type=submit]")
    page.wait_for_selector("#job-title:has-text('sft')")
    page.wait_for_selector(".chart polyline.train[points*=' ']", state="attached", timeout=4 * PATIENCE)
    assert "loss" in page.get_attribute(".chart svg", "aria-label")
    page.wait_for_selector(".job-state .succeeded", timeout=4 * PATIENCE)
    page.wait_for_selector("#job-list .state.succeeded")
    assert "[sft]" in page.locator("pre[aria-label=Log]").inner_text()
    page.click("#job summary:has-text('Files')")
    page.wait_for_selector(".artefacts a:has-text('metrics.jsonl')")
    with page.expect_download() as download:
        page.click(".artefacts a:has-text('metrics.jsonl')")
    assert '"kind": "train"' in Path(download.value.path()).read_text()


@pytest.mark.parametrize("file", [False, True], ids=["samples", "answers"])
def test_a_finished_generate_job_opens_on_its_texts(session: PageSession, tmp_path: Path, file: bool):
    section: dict[str, Any] = {"model": "tiny", "max_new_tokens": 8, "modes": ["S_MODE"]}
    if file:
        (tmp_path / "prompts.txt").write_text("Once <b>upon\nThe dog\n")
        section["prompts_file"] = str(tmp_path / "prompts.txt")
    else:
        section["prompts"] = ["Once <b>upon", "The dog"]
    body = {"kind": "generate", "config": {"generate": section}}
    job = session.context.request.post(session.url + "jobs/submit", data=body).json()["id"]
    page = session.open(f"#jobs/{job}")
    page.wait_for_selector(".texts li", timeout=4 * PATIENCE)
    page.goto("about:blank")
    session.open(f"#jobs/{job}")
    page.wait_for_selector(".texts li")
    shown = page.locator(".texts li").all_inner_texts()
    assert ["Once <b>upon" in text for text in shown] == ([True, False] if file else [True, True, False, False])
    assert file or ["AR parent" in text for text in shown] == [False, True, False, True]
    assert "8 tokens in" in shown[0] and page.locator("pre[aria-label=Log]").is_hidden()


def test_a_job_is_cancelled(session: PageSession):
    page = session.open("#jobs")
    page.click("#submit-drop summary")
    page.wait_for_selector("#job-kind option[value=run]", state="attached")
    page.select_option("#job-kind", "run")
    page.click("#submit button[type=submit]")
    page.wait_for_selector(".job-state .running")
    page.click("#job button:has-text('Cancel')")
    page.wait_for_selector(".job-state .cancelled", timeout=4 * PATIENCE)
    assert page.locator("#job button:has-text('Cancel')").is_hidden()


def test_a_job_that_makes_no_sense_is_refused_in_words(session: PageSession):
    session.refusals = 2
    page = session.open("#jobs")
    page.click("#submit-drop summary")
    page.wait_for_selector("#job-kind option[value=generate]", state="attached")
    page.fill("#job-config", "{")
    page.click("#submit button[type=submit]")
    page.wait_for_selector("#job-problem:visible")
    assert "no JSON" in page.locator("#job-problem").inner_text()
    page.fill("#job-config", '{"generate": {"model": "tiny", "promts": []}}')
    page.click("#submit button[type=submit]")
    page.wait_for_selector("#job-problem:has-text('promts')")
    page.goto(session.url + "#jobs/9999-nothing")
    page.wait_for_selector("#job-body .problem:has-text('9999-nothing')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything_without_scrolling_sideways(browser: Browser, server: Server, scheme: str):
    size = {"width": 360, "height": 740}
    session = PageSession(browser, server.url, viewport=size, has_touch=True, is_mobile=True, color_scheme=scheme)
    page = session.open()
    page.click("#settings summary")
    page.fill("#prompt", "Anextraordinarilylongwordwithoutanyspaces" * 4 + " once upon a time")
    page.check("#compare")
    page.fill("#max-tokens", "32")
    write(page, "parent")
    page.click(".keys summary")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.goto(session.url + "#jobs")
    page.click("#submit-drop summary")
    page.wait_for_selector("#job-kind option", state="attached")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    small = page.evaluate(
        """[...document.querySelectorAll("button, select, summary, input")].filter((one) => {
          const box = one.getBoundingClientRect();
          return box.width > 0 && box.height < 24 && !one.closest("label");
        }).map((one) => one.outerHTML)"""
    )
    assert small == [], "a finger needs 24 pixels"
    session.close()


def test_the_theme_follows_the_system_and_then_the_reader(browser: Browser, server: Server):
    ground = "getComputedStyle(document.body).backgroundColor"
    session = PageSession(browser, server.url, color_scheme="dark")
    page = session.open()
    dark = page.evaluate(ground)
    page.click("#theme")
    light = page.evaluate(ground)
    page.reload()
    assert page.evaluate(ground) == light != dark
    session.close()
    session = PageSession(browser, server.url, color_scheme="light")
    assert session.open().evaluate(ground) == light
    session.close()


def test_everything_can_be_done_with_keys_alone(page: Page):
    page.wait_for_selector(".status.up")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.press("Control+a")
    page.keyboard.type("The dog")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#diffusion-sheet[data-state=done]")
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        at = page.evaluate("document.activeElement.id || document.activeElement.tagName")
        visible = page.evaluate("document.activeElement.matches(':focus-visible')")
        assert visible, at
        reached.append(at)
        if at == "copy":
            break
    expected = ["start", "compare", "model", "tau-mask", "tau-edit", "temperature", "seed", "max-tokens", "stop"]
    expected += ["diffusion-canvas", "play", "back", "scrub", "ahead", "speed", "copy"]
    assert [name for name in reached if name in expected] == expected
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.focus("#diffusion-canvas")
    now = page.locator("#moment").inner_text()
    page.keyboard.press(",")
    assert page.locator("#moment").inner_text() != now
    page.keyboard.press(".")
    assert page.locator("#moment").inner_text() == now
    page.keyboard.press(" ")
    assert page.locator("#play").inner_text() == "Pause"
    page.keyboard.press(" ")
    assert page.locator("#play").inner_text() == "Play"


def test_nothing_moves_where_motion_is_unwanted(browser: Browser, server: Server):
    session = PageSession(browser, server.url, reduced_motion="reduce")
    page = session.open()
    write(page)
    moving = """[...document.querySelectorAll("*")]
      .filter((one) => getComputedStyle(one).animationName !== "none").length"""
    scrub(page, 1)
    assert page.evaluate(moving) == 0
    session.close()
