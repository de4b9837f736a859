"""Sources give every good document once, count every bad one, and keep memory bounded."""

import gzip
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corpus import dolma, story, write_jsonl, write_stories
from hildanext.core.errors import ConfigError, DataError, UnknownChoice
from hildanext.core.registry import build
from hildanext.data.sources import SOURCES, Cursor, Report, Source

COUNT = 23


def open_source(name: str, folder: Path, **knobs: Any) -> Source:
    """A source of each kind over the same stories, in one file or (eager) in many."""
    stories = [story(number) for number in range(COUNT)]
    rows = [{"text": text, "id": str(number)} for number, text in enumerate(stories)]
    place: dict[str, Any] = {"path": str(folder)}
    if name == "text":
        for number, text in enumerate(stories):
            (folder / f"{number:03d}.txt").write_text(text)
    elif name == "tinystories":
        write_stories(folder / "train.txt", stories)
    elif name == "jsonl":
        write_jsonl(folder / "a.jsonl", rows[:9])
        write_jsonl(folder / "b.jsonl.gz", rows[9:])
    elif name == "dolma":
        for number in range(COUNT):
            write_jsonl(folder / f"{number:03d}.json.gz", [dolma(number, stories[number])])
    else:
        write_jsonl(folder / "a.jsonl", rows)
        place = {"dataset": "json", "data_files": str(folder / "a.jsonl")}
    return build("source", SOURCES, {"name": name, **place, **knobs})


CASES = [  # every source, once with one part and once with more parts than some have files
    (name, parts) for name in SOURCES for parts in (1, 4)
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request: pytest.FixtureRequest) -> tuple[str, int]:
    return request.param


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.mark.filterwarnings("ignore")  # the Hugging Face library's own
def test_parts_are_disjoint_and_together_the_whole(case: tuple[str, int], tmp_path: Path) -> None:
    name, parts = case
    source = open_source(name, tmp_path)
    texts = [document.text for part in range(parts) for document in source.documents(part, parts)]
    assert sorted(texts) == sorted(story(number) for number in range(COUNT))


@pytest.mark.filterwarnings("ignore")
def test_reading_goes_on_exactly_after_any_cursor(case: tuple[str, int], tmp_path: Path) -> None:
    name, parts = case
    source = open_source(name, tmp_path)
    for part in range(parts):
        whole = list(source.read(Report(), part, parts))
        for index in range(0, len(whole), 3):
            rest = list(source.read(Report(), part, parts, whole[index][1]))
            assert [document.text for document, _ in rest] == [document.text for document, _ in whole[index + 1 :]]
            assert [cursor for _, cursor in rest] == [cursor for _, cursor in whole[index + 1 :]]


def test_a_misspelt_source_or_knob_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownChoice, match="did you mean 'tinystories'"):
        build("source", SOURCES, {"name": "tinystory", "path": "x"})
    with pytest.raises(ConfigError, match="did you mean 'text_field'"):
        build("source", SOURCES, {"name": "jsonl", "path": "x", "textfield": "body"})


def test_a_missing_path_and_an_empty_folder_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        list(build("source", SOURCES, {"name": "text", "path": str(tmp_path / "absent")}).documents())
    with pytest.raises(DataError, match="ending in .json.gz"):
        list(build("source", SOURCES, {"name": "dolma", "path": str(tmp_path)}).documents())


BAD_LINES = {
    '{"text": "cut off': "broken JSON",
    '{"id": "3"}': "missing text",
    '{"text": 7}': "text is no string",
    '["text"]': "not a JSON object",
    '{"text": "  "}': "empty document",
    "[" * 200_000: "broken JSON",
    '{"text": "' + "x" * 300_000 + '"}': "longer than 250000 bytes",
}


@pytest.mark.parametrize("parts", [1, 3])
def test_bad_lines_are_counted_once_and_never_fatal(tmp_path: Path, parts: int) -> None:
    rows: list[Any] = [{"text": story(0)}, *BAD_LINES, "", {"text": story(1)}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    path.write_bytes(path.read_bytes() + b'{"text": "\xff\xfe"}\n{"text": "last, without a newline"}')
    source = build("source", SOURCES, {"name": "jsonl", "path": str(path), "max_line_bytes": 250_000})
    counts: dict[str, int] = {}
    texts = []
    for part in range(parts):
        report = Report()
        texts += [document.text for document in source.documents(part, parts, report)]
        counts = {kind: counts.get(kind, 0) + report.counts.get(kind, 0) for kind in counts.keys() | report.counts}
    assert sorted(texts) == sorted([story(0), story(1), "last, without a newline"])
    wanted = {kind: list(BAD_LINES.values()).count(kind) for kind in BAD_LINES.values()}
    assert counts == {**wanted, "bad UTF-8": 1}


def test_the_report_names_the_place_of_the_first_bad_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "good"}, "{"])
    report = Report()
    list(build("source", SOURCES, {"name": "jsonl", "path": str(path)}).documents(report=report))
    assert report.summary() == "1 broken JSON (first: a.jsonl record 2: broken JSON)"


def test_a_text_field_may_lie_deeper(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"message": {"content": "hello"}}, {"message": "flat"}])
    source = build("source", SOURCES, {"name": "jsonl", "path": str(path), "text_field": "message.content"})
    assert [document.text for document in source.documents()] == ["hello"]


@pytest.mark.parametrize("damage", ["truncated", "garbage inside", "not gzip at all"])
def test_what_precedes_a_break_in_a_gzip_is_kept_and_the_break_is_counted(tmp_path: Path, damage: str) -> None:
    rows = [dolma(number, story(number, 300 + number)) for number in range(400)]
    write_jsonl(tmp_path / "b.json.gz", rows)
    whole = (tmp_path / "b.json.gz").read_bytes()
    broken = {
        "truncated": whole[: len(whole) // 2],
        "garbage inside": whole[: len(whole) // 2] + b"\0" * 64 + whole[len(whole) // 2 + 64 :],
        "not gzip at all": b"<html>not found</html>",
    }[damage]
    (tmp_path / "b.json.gz").write_bytes(broken)
    write_jsonl(tmp_path / "a.json.gz", [dolma(1000, "before")])
    write_jsonl(tmp_path / "c.json.gz", [dolma(1001, "after")])
    report = Report()
    texts = [document.text for document in make_dolma(tmp_path).documents(report=report)]
    assert texts[0] == "before" and texts[-1] == "after"
    kept = texts[1:-1]
    assert kept == [row["text"] for row in rows][: len(kept)]
    assert (len(kept) > 100) == (damage != "not gzip at all")
    assert report.counts["broken gzip"] == 1


def make_dolma(folder: Path) -> Source:
    return build("source", SOURCES, {"name": "dolma", "path": str(folder / "*.json.gz")})


def test_a_binary_file_is_counted_and_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "b.txt").write_text("a text")
    report = Report()
    source = build("source", SOURCES, {"name": "text", "path": str(tmp_path)})
    assert [document.text for document in source.documents(report=report)] == ["a text"]
    assert report.counts == {"binary file": 1}


def test_a_line_of_fifty_megabytes_is_counted_and_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as stream:
        stream.write(b'{"text": "first"}\n')
        for _ in range(50):
            stream.write(b"x" * (1 << 20))
        stream.write(b'\n{"text": "last"}\n')
    report = Report()
    source = build("source", SOURCES, {"name": "jsonl", "path": str(path), "max_line_bytes": 1 << 20})
    tracemalloc.start()
    texts = [document.text for document in source.documents(report=report)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == ["first", "last"]
    assert report.counts == {"longer than 1048576 bytes": 1}
    assert peak < 6 << 20


def test_a_long_gzip_line_costs_no_memory_either(tmp_path: Path) -> None:
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b"x" * (50 << 20) + b'\n{"text": "last"}\n', 1))
    report = Report()
    source = build("source", SOURCES, {"name": "dolma", "path": str(path), "max_line_bytes": 1 << 20})
    tracemalloc.start()
    texts = [document.text for document in source.documents(report=report)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == ["last"] and report.total == 1
    assert peak < 6 << 20


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("file", ["one\ntwo\n\nthree"]), ("paragraph", ["one\ntwo", "three"]), ("line", ["one", "two", "three"])],
)
def test_text_is_a_document_per_file_paragraph_or_line(tmp_path: Path, kind: str, wanted: list[str]) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree\r\n")
    source = build("source", SOURCES, {"name": "text", "path": str(tmp_path), "document": kind})
    assert [document.text for document in source.documents()] == wanted


def test_a_long_text_file_is_cut_between_lines_and_loses_nothing(tmp_path: Path) -> None:
    lines = [story(number) for number in range(200)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    source = build("source", SOURCES, {"name": "text", "path": str(tmp_path), "max_line_bytes": 1000})
    texts = [document.text for document in source.documents()]
    assert len(texts) > 10 and max(map(len, texts)) <= 1000
    assert "\n".join(texts).split("\n") == lines


def test_a_separator_inside_a_line_ends_a_story_and_a_cursor_may_stand_there(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one<|endoftext|>two\nmore<|endoftext|><|endoftext|>\nthree<|endoftext|>four")
    source = build("source", SOURCES, {"name": "tinystories", "path": str(tmp_path / "a.txt")})
    whole = list(source.read(Report()))
    assert [document.text for document, _ in whole] == ["one", "two\nmore", "three", "four"]
    for index, (_, cursor) in enumerate(whole):
        assert [document.text for document, _ in source.read(Report(), 0, 1, cursor)] == [
            document.text for document, _ in whole[index + 1 :]
        ]


def test_a_story_that_is_too_long_is_skipped_to_its_end(tmp_path: Path) -> None:
    lines = [
        "short",
        "<|endoftext|>",
        *["a line of a long story"] * 50,
        "<|endoftext|>",
        "short again",
        "<|endoftext|>",
    ]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    report = Report()
    source = build("source", SOURCES, {"name": "tinystories", "path": str(tmp_path / "a.txt"), "max_line_bytes": 200})
    assert [document.text for document in source.documents(report=report)] == ["short", "short again"]
    assert report.counts == {"longer than 200 bytes": 1}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.sampled_from(["a", "bc", "\n", "<|endoftext|>", " ", "d" * 40, "\r\n"]), max_size=40))
def test_stories_are_what_splitting_the_whole_text_gives(tmp_path: Path, pieces: list[str]) -> None:
    text = "".join(pieces)
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    source = build("source", SOURCES, {"name": "tinystories", "path": str(path), "max_line_bytes": 100_000})
    wanted = [part.replace("\r\n", "\n").strip() for part in text.split("<|endoftext|>")]
    whole = list(source.read(Report()))
    assert [document.text for document, _ in whole] == [part for part in wanted if part]
    for index, (_, cursor) in enumerate(whole):
        rest = [document.text for document, _ in source.read(Report(), 0, 1, cursor)]
        assert rest == [document.text for document, _ in whole[index + 1 :]]


def test_thousands_of_dolma_shards_are_read_in_order(tmp_path: Path) -> None:
    for number in range(2000):
        write_jsonl(tmp_path / f"{number:05d}.json.gz", [dolma(number, f"text {number}")])
    assert [document.id for document in make_dolma(tmp_path).documents()] == [f"doc-{number}" for number in range(2000)]


def test_real_dolma_files_are_read(real_data: Path) -> None:
    report = Report()
    documents = list(
        build("source", SOURCES, {"name": "dolma", "path": str(real_data / "dolma")}).documents(report=report)
    )
    assert len(documents) > 20 and all(document.text and document.id for document in documents)


def test_real_tinystories_are_read(real_data: Path) -> None:
    path = str(real_data / "tinystories" / "valid.txt")
    documents = list(build("source", SOURCES, {"name": "tinystories", "path": path}).documents())
    assert len(documents) == 116
    assert not any("<|endoftext|>" in document.text for document in documents)


@pytest.mark.filterwarnings("ignore")
def test_a_data_set_that_cannot_be_had_says_what_to_do(tmp_path: Path) -> None:
    absent = {"name": "huggingface", "dataset": "json", "data_files": str(tmp_path / "absent.jsonl")}
    with pytest.raises(DataError, match="cannot open the data set 'json'.*absent.jsonl.*a local folder works too"):
        list(build("source", SOURCES, absent).documents())


def test_a_stream_that_breaks_off_says_where_and_that_it_can_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(self: Source, done: int) -> Iterator[dict[str, Any]]:
        yield from ({"text": story(number), "id": number} for number in range(done, 3))
        raise ConnectionError("the hub went away")

    monkeypatch.setattr(SOURCES["huggingface"], "_open", rows)
    source = build("source", SOURCES, {"name": "huggingface", "dataset": "far/away"})
    with pytest.raises(DataError, match="broke off after 3 rows .the hub went away.*run the same command again"):
        list(source.documents())
    assert next(source.documents()).text == story(0)


def test_a_cursor_and_a_report_survive_json() -> None:
    report = Report()
    report.bad("broken JSON", "a")
    again = Report(**json.loads(json.dumps(report.snapshot())))
    assert again.snapshot() == report.snapshot()
    assert Cursor(*json.loads(json.dumps(Cursor(1, 2, 3)))) == Cursor(1, 2, 3)


@pytest.mark.parametrize("split, first, end", [("train[:4]", 0, 4), ("train[3:7]", 3, 7), ("train[5:]", 5, 9)])
def test_a_split_may_name_some_of_its_rows_and_be_resumed_among_them(tmp_path, split, first, end):
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"text {number}", "id": str(number)} for number in range(9)])
    files = str(tmp_path / "a.jsonl")
    source = build("source", SOURCES, {"name": "huggingface", "dataset": "json", "data_files": files, "split": split})
    whole = list(source.read(Report()))
    assert [document.id for document, _ in whole] == [str(number) for number in range(first, end)]
    again = list(source.read(Report(), start=whole[1][1]))
    assert [document for document, _ in again] == [document for document, _ in whole[2:]]


@pytest.mark.parametrize("split", ["train[10%:]", "train[:5", "train[a:b]"])
def test_a_split_that_cannot_be_read_is_refused(split):
    with pytest.raises(ConfigError, match="split"):
        build("source", SOURCES, {"name": "huggingface", "dataset": "json", "split": split})
