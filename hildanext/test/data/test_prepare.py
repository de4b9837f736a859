"""`prepare` writes the same bytes however often it is killed, refuses to mix, and says what is wrong with a corpus."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hildanext
from corpus import BOS, EOS, dolma, files_of, small_tokenizer, story, write_jsonl, write_stories
from hildanext.cli import main
from hildanext.core.errors import CheckpointError, DataError
from hildanext.data.packing.folder import sha256
from hildanext.data.packing.shards import locked
from hildanext.datasets import PackedDataset, PrepareConfig, prepare


def knobs(source: dict[str, Any], out: Path, **others: Any) -> PrepareConfig:
    return PrepareConfig(source=source, out=str(out), **others)


@pytest.fixture
def stories(tmp_path: Path) -> dict[str, Any]:
    path = write_stories(tmp_path / "train.txt", [story(number) for number in range(60)])
    return {"name": "tinystories", "path": str(path)}


def test_the_shards_hold_the_documents(stories: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    manifest = prepare(knobs(stories, tmp_path / "out", shard_tokens=700), tokenizer)
    assert manifest["documents"] == 60 and len(manifest["shards"]) > 3
    texts = []
    for number, entry in enumerate(manifest["shards"]):
        tokens = np.fromfile(tmp_path / "out" / f"shard-{number:05d}.tokens.u32", "<u4")
        offsets = np.fromfile(tmp_path / "out" / f"shard-{number:05d}.offsets.u64", "<u8")
        assert (len(tokens), len(offsets)) == (entry["tokens"], entry["documents"] + 1)
        for begin, end in zip(offsets[:-1], offsets[1:], strict=True):
            document = tokens[begin:end].tolist()
            assert document[0] == tokenizer.bos_token_id and document[-1] == tokenizer.eos_token_id
            texts.append(tokenizer.decode(document[1:-1]))
        for name, digest in entry["sha256"].items():
            assert sha256(tmp_path / "out" / name) == digest
    assert texts == [story(number) for number in range(60)]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    assert not (tmp_path / "out" / "journal.jsonl").exists()


def test_the_batches_of_the_tokenizer_do_not_show(
    stories: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(knobs(stories, tmp_path / "a", shard_tokens=700), small_tokenizer())
    monkeypatch.setattr("hildanext.datasets.BATCH_DOCUMENTS", 7)
    prepare(knobs(stories, tmp_path / "b", shard_tokens=700), small_tokenizer())
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_a_special_token_in_a_text_is_text_unless_asked(tmp_path: Path) -> None:
    source = {"name": "jsonl", "path": str(write_jsonl(tmp_path / "a.jsonl", [{"text": f"a {BOS} b"}]))}
    tokenizer = small_tokenizer()
    for asked, count in ((False, 1), (True, 2)):
        out = tmp_path / f"out-{asked}"
        prepare(knobs(source, out, special_tokens_in_text=asked), tokenizer)
        tokens = np.fromfile(out / "shard-00000.tokens.u32", "<u4").tolist()
        assert tokens.count(tokenizer.bos_token_id) == count
        assert tokenizer.decode(tokens[1:-1]) == f"a {BOS} b"


def test_the_tokenizer_is_left_as_it_was(stories: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = small_tokenizer(290)
    tokenizer.backend_tokenizer.enable_truncation(3)
    before = tokenizer.backend_tokenizer.to_str()
    manifest = prepare(knobs(stories, tmp_path / "out"), tokenizer)
    tokenizer.backend_tokenizer.no_truncation()
    assert manifest["tokens"] > 60 * 10, "a tokenizer's own truncation does not cut documents"
    tokenizer.backend_tokenizer.enable_truncation(3)
    assert tokenizer.backend_tokenizer.to_str() == before
    tokenizer.backend_tokenizer.no_truncation()


def test_edges_can_be_chosen_and_a_missing_one_says_how(stories: dict[str, Any], tmp_path: Path) -> None:
    bare = small_tokenizer(300, None)
    with pytest.raises(DataError, match='no BOS token: set bos_token.*"<|endoftext|>".*add_bos=false'):
        prepare(knobs(stories, tmp_path / "a"), bare)
    manifest = prepare(knobs(stories, tmp_path / "b", bos_token=EOS), bare)
    assert manifest["bos_id"] == manifest["eos_id"] == bare.eos_token_id
    assert prepare(knobs(stories, tmp_path / "c", add_bos=False), bare)["bos_id"] is None
    with pytest.raises(DataError, match="not in the vocabulary"):
        prepare(knobs(stories, tmp_path / "d", bos_token="<absent>"), bare)


def test_a_mask_token_does_not_make_it_another_tokenizer(stories: dict[str, Any], tmp_path: Path) -> None:
    """The converted twin of a parent has one token more, which no text ever holds."""
    tokenizer = small_tokenizer(280)
    prepare(knobs(stories, tmp_path / "out"), tokenizer)
    masked = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, bos_token=BOS, eos_token=EOS)
    masked.add_special_tokens({"mask_token": "<|mask|>"})
    manifest = prepare(knobs(stories, tmp_path / "out"), masked)
    assert manifest["vocab_size"] <= masked.mask_token_id


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_hold_the_same_documents_as_one(stories: dict[str, Any], tmp_path: Path, parts: int) -> None:
    whole = prepare(knobs(stories, tmp_path / "one"), small_tokenizer())
    for part in range(parts):
        prepare(knobs(stories, tmp_path / "many"), small_tokenizer(), (part, parts))
    one, many = PackedDataset(tmp_path / "one", 64), PackedDataset(tmp_path / "many", 64)
    assert one.tokens == many.tokens == whole["tokens"]
    with pytest.raises(DataError, match="already holds part-"):
        prepare(knobs(stories, tmp_path / "many"), small_tokenizer(), (0, parts + 1))
    with pytest.raises(DataError, match="already holds a corpus prepared in one part"):
        prepare(knobs(stories, tmp_path / "one"), small_tokenizer(), (0, 2))
    with pytest.raises(DataError, match="other settings: shard_tokens"):
        prepare(knobs(stories, tmp_path / "many", shard_tokens=10), small_tokenizer(), (0, parts))


@pytest.mark.parametrize("finished", [True, False])
def test_another_tokenizer_or_setting_is_never_mixed_in(
    stories: dict[str, Any], tmp_path: Path, finished: bool
) -> None:
    out = tmp_path / "out"
    if finished:
        prepare(knobs(stories, out, shard_tokens=500), small_tokenizer())
    else:
        interrupt(lambda: prepare(knobs(stories, out, shard_tokens=500), small_tokenizer(), progress=after(40)))
    before = files_of(out)
    for different, named in (
        (lambda: prepare(knobs(stories, out, shard_tokens=500), small_tokenizer(310)), "tokenizer"),
        (lambda: prepare(knobs(stories, out, shard_tokens=501), small_tokenizer()), "shard_tokens"),
        (lambda: prepare(knobs(stories, out, shard_tokens=500, add_eos=False), small_tokenizer()), "eos_id"),
        (lambda: prepare(knobs({**stories, "separator": "x"}, out, shard_tokens=500), small_tokenizer()), "source"),
    ):
        with pytest.raises(DataError, match=f"other settings.*{named}.*never mixed"):
            different()
    with open(stories["path"], "a") as stream:
        stream.write("one more")
    with pytest.raises(DataError, match="other settings.*input files"):
        prepare(knobs(stories, out, shard_tokens=500), small_tokenizer())
    assert files_of(out) == before


class Stop(Exception):
    """Raised from a progress callback, to break off anywhere."""


def after(documents: int) -> Callable[[int, int], None]:
    seen = 0

    def progress(new: int, _: int) -> None:
        nonlocal seen
        seen += new
        if seen > documents:
            raise Stop

    return progress


def interrupt(action: Callable[[], Any]) -> None:
    with pytest.raises(Stop):
        action()


@pytest.mark.parametrize("kind", ["parent samples", "function"])
def test_token_documents_resume_too(tmp_path: Path, kind: str) -> None:
    samples = [[2 + (number * index) % 290 for index in range(1, 20)] for number in range(40)]
    samples[7] = []
    documents: Any = samples if kind == "parent samples" else lambda start: samples[start:]
    whole = prepare(knobs({"name": "parent"}, tmp_path / "a", shard_tokens=100), small_tokenizer(), documents=documents)
    assert whole["documents"] == 39 and whole["refused"]["counts"] == {"empty document": 1}
    again = knobs({"name": "parent"}, tmp_path / "b", shard_tokens=100)
    for stop in (3, 11, 20):
        interrupt(lambda stop=stop: prepare(again, small_tokenizer(), documents=documents, progress=after(stop)))
    prepare(again, small_tokenizer(), documents=documents)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_a_torn_journal_and_files_it_does_not_know_are_no_trouble(stories: dict[str, Any], tmp_path: Path) -> None:
    settings, out = knobs(stories, tmp_path / "a", shard_tokens=500), tmp_path / "a"
    prepare(knobs(stories, tmp_path / "b", shard_tokens=500), small_tokenizer())
    interrupt(lambda: prepare(settings, small_tokenizer(), progress=after(40)))
    with open(out / "journal.jsonl", "ab") as journal:
        journal.write(b'{"cursor": [0, 12')
    (out / "shard-00099.tokens.u32").write_bytes(b"left over")
    (out / "shard-00002.tokens.u32.tmp-1").write_bytes(b"left over")
    prepare(settings, small_tokenizer())
    assert files_of(out) == files_of(tmp_path / "b")


def test_a_damaged_journal_says_what_to_do(stories: dict[str, Any], tmp_path: Path) -> None:
    settings, out = knobs(stories, tmp_path / "a", shard_tokens=500), tmp_path / "a"
    interrupt(lambda: prepare(settings, small_tokenizer(), progress=after(40)))
    (out / "journal.jsonl").write_bytes(b"\0" * 100 + b"\n")
    with pytest.raises(DataError, match="journal.jsonl is damaged: delete"):
        prepare(settings, small_tokenizer())


@pytest.mark.parametrize("bad", [300, -1, 2**32 + 5])
def test_an_id_outside_the_vocabulary_is_an_error_and_never_wrapped(tmp_path: Path, bad: int) -> None:
    with pytest.raises(DataError, match=f"document 2 holds token id {bad}, outside the vocabulary of 300"):
        prepare(knobs({"name": "parent"}, tmp_path / "out"), small_tokenizer(), documents=[[2, 3], [4, bad]])


def test_a_second_writer_is_kept_out(stories: dict[str, Any], tmp_path: Path) -> None:
    with locked(tmp_path / "out"), pytest.raises(DataError, match="another process is preparing"):
        prepare(knobs(stories, tmp_path / "out"), small_tokenizer())
    prepare(knobs(stories, tmp_path / "out"), small_tokenizer())


def test_a_full_disk_says_so_and_the_next_run_goes_on(
    stories: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 9:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="out of disk"):
        prepare(knobs(stories, tmp_path / "a", shard_tokens=500), small_tokenizer())
    monkeypatch.undo()
    prepare(knobs(stories, tmp_path / "a", shard_tokens=500), small_tokenizer())
    prepare(knobs(stories, tmp_path / "b", shard_tokens=500), small_tokenizer())
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def messy(folder: Path) -> dict[str, Any]:
    """Dolma shards with bad lines before, between and after the good ones, one broken gzip, one binary file."""
    folder.mkdir()
    for number in range(6):
        rows: list[Any] = [dolma(index, story(index)) for index in range(number * 10, number * 10 + 10)]
        write_jsonl(folder / f"{number}.json.gz", ["{", *rows[:5], '{"id": 1}', *rows[5:], "[]"])
    broken = folder / "3.json.gz"
    broken.write_bytes(broken.read_bytes()[:-20])
    (folder / "5a.json.gz").write_bytes(gzip.compress(bytes(1000)))
    return {"name": "dolma", "path": str(folder)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("kind", ["stories", "dolma"])
def test_a_kill_at_any_write_leaves_a_folder_that_resumes_to_the_same_bytes(
    kind: str, stories: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child dies, without any cleaning up, before its n-th sync or rename, for every n; then again, and again."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    source = messy(tmp_path / "dolma") if kind == "dolma" else stories
    tokenizer = small_tokenizer()
    size = 1500
    prepare(knobs(source, tmp_path / "whole", shard_tokens=size), tokenizer)
    expected = files_of(tmp_path / "whole")
    assert len(expected) >= 5
    deaths = 0
    for step in range(1, 500):
        out = tmp_path / f"out-{step}"
        again = lambda out=out: prepare(knobs(source, out, shard_tokens=size), tokenizer)  # noqa: E731
        if not dies_at_write(step, again):
            break
        dies_at_write(step % 11 + 1, again)  # the resumed run is killed as well
        assert not dies_at_write(1000, again)
        assert files_of(out) == expected, f"killed before write {step}"
        deaths += 1
    assert deaths >= 25


def dies_at_write(step: int, action: Callable[[], Any]) -> bool:
    """Run `action` in a forked child that dies before its `step`-th sync, rename or removal; True if it did."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _die_at(step)
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def _die_at(step: int) -> None:
    left = step

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os._exit(9)
            return real(*arguments, **named)

        return call

    # a killed process loses no written byte, so that the child need not wait for the disk
    os.fsync = counting(lambda handle: None)
    for place, name in ((os, "replace"), (Path, "replace"), (Path, "unlink")):
        setattr(place, name, counting(getattr(place, name)))


PROGRAM = """
import sys
import hildanext.datasets
from corpus import small_tokenizer
hildanext.datasets.BATCH_CHARACTERS = 20_000
settings = hildanext.datasets.PrepareConfig(
    source={"name": "tinystories", "path": sys.argv[1]}, out=sys.argv[2], shard_tokens=4000
)
print("ready", flush=True)
hildanext.datasets.prepare(settings, small_tokenizer())
"""
KILLS = 6


@pytest.mark.slow
def test_kill_nine_at_random_moments(real_data: Path, tmp_path: Path) -> None:
    source = {"name": "tinystories", "path": str(real_data / "tinystories" / "train.txt")}
    prepare(knobs(source, tmp_path / "whole", shard_tokens=4000), small_tokenizer())
    moments, shards = random.Random(0), []
    for run in range(KILLS + 1):
        child = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, source["path"], str(tmp_path / "out")],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        child.stdout.close()
        if run < KILLS:
            time.sleep(moments.uniform(0.05, 0.6))
            child.send_signal(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL, "it was finished before it could be killed"
            shards.append(len(list((tmp_path / "out").glob("*.tokens.u32"))))
        else:
            assert child.wait() == 0
    print(f"shards at each kill: {shards}")
    assert shards[-1] > 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


BAD_CORPORA: dict[str, tuple[str, str, Callable[[Path], Any], str]] = {
    "empty file": ("tinystories", "a.txt", lambda path: path.write_bytes(b""), "give a corpus with at least one text"),
    "only blanks": ("text", "a.txt", lambda path: path.write_text("\n \n"), "give a corpus with at least one text"),
    "binary": ("text", "a.txt", lambda path: path.write_bytes(bytes(9)), "1 binary file.*give text, JSONL or gzip"),
    "broken JSON": ("jsonl", "a.jsonl", lambda path: path.write_text("{\n{\n"), "2 broken JSON.*is it plain text"),
    "no text field": ("jsonl", "a.jsonl", lambda path: write_jsonl(path, [{"body": "x"}]), "missing text.*text_field"),
    "no gzip": ("dolma", "a.json.gz", lambda path: path.write_bytes(b"<html>"), "broken or truncated gzip.*again"),
    "truncated gzip": (
        "dolma",
        "a.json.gz",
        lambda path: path.write_bytes(gzip.compress(json.dumps(dolma(0, story(0, 5000))).encode() + b"\n" * 9)[:-30]),
        "broken or truncated gzip.*get the file again",
    ),
    "empty gzip": ("dolma", "a.json.gz", lambda path: path.write_bytes(b""), "at least one text"),
    "a 50 MB line": (
        "jsonl",
        "a.jsonl",
        lambda path: path.write_bytes(b'{"text": "' + b"x" * (50 << 20) + b'"}\n'),
        "1 longer than 8388608 bytes.*raise the source's max_line_bytes",
    ),
    "no file": ("jsonl", "a.jsonl", lambda path: None, "no such file or folder.*check the source's path"),
    "not UTF-8": (
        "text",
        "a.txt",
        lambda path: path.write_bytes("é".encode("latin-1")),
        "1 bad UTF-8.*save it as UTF-8",
    ),
}


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> str:
    small_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "config.json").write_text("{}")
    return str(tmp_path / "tokenizer")


def run_verb(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(["prepare", *arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.parametrize("name", BAD_CORPORA)
def test_a_corpus_that_cannot_be_used_is_one_line_and_exit_code_2(
    name: str, tmp_path: Path, tokenizer_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    source, file, write, wanted = BAD_CORPORA[name]
    write(tmp_path / file)
    flags = ["--source", source, "--path", str(tmp_path / file), "--tokenizer", tokenizer_folder]
    code, _, said = run_verb([*flags, "--out", str(tmp_path / "out")], capsys)
    assert code == 2
    assert said.startswith("error: ") and said.count("\n") == 1
    assert re.search(wanted, said), said
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_verb_prepares_reports_and_knows_when_it_is_done(
    tmp_path: Path, tokenizer_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = messy(tmp_path / "dolma")
    flags = [
        "--source",
        "dolma",
        "--path",
        source["path"],
        "--tokenizer",
        tokenizer_folder,
        "--out",
        str(tmp_path / "o"),
    ]
    code, said, _ = run_verb(flags, capsys)
    assert code == 0
    assert "left out: 6 broken JSON" in said and "left out: 1 broken gzip" in said and "left out: 1 binary file" in said
    assert "tokens/s" in said
    code, said, _ = run_verb(flags, capsys)
    assert code == 0 and "it was whole already" in said
    assert PackedDataset(tmp_path / "o", 32, verify=True).tokens > 0


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--out", "x"], "no source"),
        (["--source", "text", "--path", "x"], "no output folder"),
        (["--source", "text", "--path", "x", "--out", "x", "--shard", "3/3"], "--shard '3/3'"),
        (["--source", "txt", "--path", "x", "--out", "x"], "did you mean 'text'"),
        (
            ["--source", "text", "--path", "x", "--out", "x", "--set", "prepare.shard_token=3"],
            "did you mean 'shard_tokens'",
        ),
        (
            ["--source", "text", "--path", "x", "--out", "x", "--set", "prepare.shard_tokens=many"],
            "shard_tokens: 'many' is no whole number",
        ),
    ],
)
def test_wrong_flags_are_one_line_and_exit_code_2(
    flags: list[str],
    wanted: str,
    tokenizer_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, said = run_verb([*flags, "--tokenizer", tokenizer_folder], capsys)
    assert code == 2 and wanted in said and said.count("\n") == 1


def test_the_same_folder_from_a_config_file(
    stories: dict[str, Any], tmp_path: Path, tokenizer_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    section = {"source": stories, "out": str(tmp_path / "out"), "tokenizer": tokenizer_folder, "shard_tokens": 700}
    (tmp_path / "run.json").write_text(json.dumps({"prepare": section}))
    code, said, _ = run_verb(["--config", str(tmp_path / "run.json")], capsys)
    assert code == 0 and "60 documents" in said


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """Three times the corpus, the same peak: what is held is one shard and one batch."""
    import tracemalloc

    peaks = []
    for size in (1, 3):
        path = write_stories(tmp_path / f"{size}.txt", [story(number) for number in range(size * 1500)])
        settings = knobs({"name": "tinystories", "path": str(path)}, tmp_path / f"out-{size}", shard_tokens=20_000)
        tracemalloc.start()
        prepare(settings, small_tokenizer())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


def test_the_help_names_every_row_of_the_tables():
    from hildanext.core.knobs import names_in
    from hildanext.data.causal_graphs import EXTRACTORS
    from hildanext.data.sources import SOURCES

    data = Path(hildanext.__file__).parent / "data"
    assert names_in(data / "sources", "SOURCES") == tuple(SOURCES)
    assert names_in(data / "causal_graphs", "EXTRACTORS") == tuple(EXTRACTORS)


@pytest.mark.parametrize("packed", [False, True])
def test_how_much_of_the_files_is_read_is_known(packed: bool, stories: dict[str, Any], tmp_path: Path) -> None:
    import gzip

    text = Path(stories["path"]).read_bytes()
    for name in "ab":
        (tmp_path / f"{name}.txt").write_bytes(gzip.compress(text) if packed else text)
    source = {**stories, "path": [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]}
    shares: list[float] = []
    whole = prepare(knobs(source, tmp_path / "out", shard_tokens=30), small_tokenizer(), reached=shares.append)
    assert len(shares) == whole["documents"] + 1 and shares[0] == 0.0
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1.0, abs=0.02)
    assert shares[len(shares) // 2] == pytest.approx(0.5, abs=0.02)
