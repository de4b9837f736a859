"""The page needs nothing but its own files, has a name for every control, and works in a real browser."""

import json
import re
import tomllib
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest

from hildanext.stages import STAGES
from hildanext.stages.submission import open_jobs

STATIC = Path(str(files("hildanext"))) / "serve" / "static"
BACKEND = Path(__file__).parents[2] / "backend"
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(STATIC.iterdir())}
SCRIPTS = {name: text for name, text in TEXTS.items() if name.endswith(".js")}
VOID = {"meta", "link", "input", "br", "img"}
CONTROLS = {"input", "select", "textarea", "button"}


class Page(HTMLParser):
    """What the tests ask of a document: its tags with their attributes, what is around them, and their text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.around: list[list[str]] = []
        self.inside: dict[int, str] = {}
        self.open: list[tuple[str, int]] = []
        self.faults: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.around.append([name for name, _ in self.open])
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, len(self.tags) - 1))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop()[0] != tag:
            self.faults.append(tag)

    def handle_data(self, data: str) -> None:
        for _, at in self.open:
            self.inside[at] = self.inside.get(at, "") + data


PAGE = Page(TEXTS["index.html"])
IDS = [attrs["id"] for _, attrs in PAGE.tags if "id" in attrs]


def test_the_document_is_whole_and_says_its_language():
    assert PAGE.faults == [] and PAGE.open == []
    tags = dict(PAGE.tags)
    assert tags["html"]["lang"] == "en" and tags["title"] == {} and "main" in tags
    assert any(attrs.get("name") == "viewport" for tag, attrs in PAGE.tags if tag == "meta")
    assert len(IDS) == len(set(IDS))


def test_every_control_has_a_name():
    labelled = {attrs["for"] for tag, attrs in PAGE.tags if tag == "label" and "for" in attrs}
    for at, (tag, attrs) in enumerate(PAGE.tags):
        if tag not in CONTROLS:
            continue
        named = attrs.get("id") in labelled or attrs.get("aria-label") or "label" in PAGE.around[at]
        assert named or (tag == "button" and PAGE.inside.get(at, "").strip()), (tag, attrs)


def test_references_lead_to_parts_of_the_page():
    for tag, attrs in PAGE.tags:
        for name in ("for", "aria-labelledby", "aria-describedby"):
            for target in (attrs.get(name) or "").split():
                assert target in IDS, (tag, name, target)
        link = attrs.get("href") or ""
        assert not link.startswith("#") or link[1:] in IDS
    for name, script in SCRIPTS.items():
        for target in re.findall(r"\$\(\"([\w-]+)\"\)|getElementById\(\"([\w-]+)\"\)", script):
            assert "".join(target) in IDS, (name, target)


def test_the_page_loads_only_its_own_files():
    for tag, attrs in PAGE.tags:
        for name in ("src", "href"):
            if attrs.get(name) and not str(attrs[name]).startswith("#"):
                assert str(attrs[name]).removeprefix("static/") in TEXTS, (tag, attrs)
    for name, script in SCRIPTS.items():
        for module in re.findall(r"from \"(.*?)\"", script):
            assert module.removeprefix("./") in TEXTS, (name, module)
    for name, text in TEXTS.items():
        addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w[^\s\"')]*", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}, name
        assert "@import" not in text and "url(" not in text, name


def test_a_strict_content_policy_forbids_nothing_that_the_page_does():
    for at, (tag, attrs) in enumerate(PAGE.tags):
        assert not [name for name in attrs if name.startswith("on") or name == "style"], attrs
        assert tag != "style" and not (tag == "script" and PAGE.inside.get(at, "").strip())
    for name, script in SCRIPTS.items():
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
            assert word not in script, name


def test_the_key_is_kept_for_the_tab_alone():
    assert "sessionStorage.setItem(KEY" in SCRIPTS["api.js"]
    kept = re.findall(r"localStorage\.setItem\((\w+)", "".join(SCRIPTS.values()))
    assert kept == ["NAME"] and 'NAME = "hilda-theme"' in SCRIPTS["theme.js"]


def test_its_files_are_small_and_are_installed():
    assert {name for name, text in TEXTS.items() if text.count("\n") > 400} == set()
    settings = tomllib.loads((BACKEND / "pyproject.toml").read_text(encoding="utf-8"))
    assert "serve/static/**/*" in settings["tool"]["setuptools"]["package-data"]["hildanext"]


EXAMPLES = json.loads(TEXTS["job_examples.json"])


def submit(jobs, kind):
    """As the page does it: what has stages of its own is a whole recipe."""
    config = EXAMPLES[kind]["config"]
    return jobs.submit("run" if "stages" in config else kind, config)


def test_every_example_of_a_job_can_be_submitted_where_nothing_was_made_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert set(EXAMPLES) == {"run", *STAGES} and 'config?.stages !== undefined ? "run"' in SCRIPTS["jobs.js"]
    with open_jobs(tmp_path / "jobs") as jobs:
        for kind in EXAMPLES:
            job = submit(jobs, kind)
            recipe = json.loads((tmp_path / "jobs" / job.id / "job.json").read_text())
            assert kind in ("run", *(step["stage"] for step in recipe["stages"]))
    assert not re.search(r'"(?:train|valid|data|run|model)": "[^"]*/', TEXTS["job_examples.json"]), (
        "another run's files"
    )


@pytest.mark.slow
def test_every_example_of_a_job_succeeds_where_nothing_was_made_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_jobs(tmp_path / "jobs") as jobs:
        submitted = [submit(jobs, kind) for kind in EXAMPLES]
        jobs.start()
        for job in submitted:
            for _ in jobs.follow(job.id):
                pass
            ended = jobs.get(job.id)
            assert ended.state == "succeeded", (job.kind, ended.error, jobs.log(job.id))


def colours() -> dict[str, tuple[str, str]]:
    return dict(
        (name, (light, dark))
        for name, light, dark in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", TEXTS["page.css"])
    )


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_words_stand_out_from_what_is_behind_them(theme):
    """WCAG 2.2, 1.4.3 and 1.4.11: 4.5 to 1 for text, 3 to 1 for the edges of controls and the marks of states."""
    palette = colours()
    text = [(ink, ground) for ink in ("ink", "soft", "faint") for ground in ("sheet", "paper", "well")]
    text += [("ink", "draft"), ("ink", "edit"), ("ink", "bad")]
    text += [("on-accent", "accent"), ("accent", "sheet"), ("paper", "ink")]
    marks = [(name, "sheet") for name in ("mask", "draft-line", "edit-line", "bad-line", "good-line", "edge", "accent")]
    for pairs, least in ((text, 4.5), (marks, 3.0)):
        for over, under in pairs:
            one, other = sorted((luminance(palette[over][theme]), luminance(palette[under][theme])))
            assert (other + 0.05) / (one + 0.05) >= least, (over, under)
