"""Tasks: one prompt for all, answers that do not depend on the batch, samples that survive a kill, honest tables."""

import json
from dataclasses import replace

import pytest
import torch

from hildanext.ar import Parent
from hildanext.cli import main
from hildanext.core.errors import ConfigError, DataError, HildaError, PromptError
from hildanext.core.metrics_log import read_metrics
from hildanext.core.registry import build
from hildanext.data.chat_template import Message, encode_chat
from hildanext.data.generation_result import GenerationResult, GenerationStats
from hildanext.decoding import MODES
from hildanext.eval.journal import Journal
from hildanext.eval.models import DiffusionEvalModel, GenerationParams, ModelPair, ParentEvalModel
from hildanext.eval.runner import QualityConfig, as_taught, run_tasks
from hildanext.eval.summary import mask_tokens, summarise
from hildanext.eval.task_session import print_tasks, run_session
from hildanext.eval.task_tables import lines as table_lines
from hildanext.eval.tasks import TASKS, WritingTask
from hildanext.models.start import start_conversion
from hildanext.recipe import StageContext
from hildanext.report.html import write_report
from hildanext.stages import eval as eval_stage
from hildanext.tokenization import encode_prompt
from quality_fixtures import CHOICES, QUESTIONS, gsm8k_folder, lines, stories_file, tiny_pair

MATH = [{"problem": "What is $1+1$?", "answer": "2"}, {"problem": "Half?", "solution": "It is $\\boxed{\\frac12}$."}]


@pytest.fixture
def sections(tmp_path):
    """A section for each task, over files of a few rows."""
    return {
        "gsm8k": {"data": gsm8k_folder(tmp_path / "gsm8k"), "few_shot": 1, "max_new_tokens": 10},
        "math500": {"data": lines(tmp_path / "math.jsonl", MATH), "few_shot": 0, "max_new_tokens": 6},
        "tinystories": {"data": stories_file(tmp_path / "stories.txt"), "draws": 2},
        "multiple_choice": {"data": lines(tmp_path / "choices.jsonl", CHOICES), "style": "text", "draws": 2},
    }


def samples_of(runs, cost: bool = False) -> dict:
    """(task, way, index, repeat) to a sample, without what a clock told."""
    clocks = set() if cost else {"seconds", "wall_seconds"}
    return {
        (run.key, outcome.model.name, sample["index"], sample["repeat"]): {
            key: value for key, value in sample.items() if key not in clocks
        }
        for run in runs
        for outcome in run.outcomes
        for sample in outcome.samples
    }


def same(one, other) -> None:
    """Equal, numbers up to the last digits that a batch's shape may change."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            same(a, b)
    else:
        assert one == (pytest.approx(other, abs=1e-6) if isinstance(other, float) else other)


def test_every_way_sees_the_same_string_and_every_sample_is_kept(sections, tmp_path):
    runs = run_tasks(tiny_pair(), QualityConfig(tasks=sections), tmp_path / "out", quiet=True)
    assert [run.key for run in runs] == list(sections)
    for run in runs:
        names = [outcome.model.name for outcome in run.outcomes]
        assert names[0] == "AR parent" and len(names) == (2 if isinstance(run.task, WritingTask) else 3)
        prompts = [[sample["prompt"] for sample in outcome.samples] for outcome in run.outcomes]
        assert all(own == prompts[0] for own in prompts) and len(prompts[0]) == len(run.task.items())
        for outcome in run.outcomes:
            for sample in outcome.samples:
                assert sample["forwards"] > 0 and sample["tokens"] > 0 and sample["seconds"] > 0
                assert sample["scores"] and "extraction" in sample
                assert sample.get("mask_tokens", 0) == 0
            (path,) = [
                file
                for file in (tmp_path / "out").glob(f"{run.key.replace('_', '-')}--*.jsonl")
                if json.loads(file.with_suffix(".json").read_text())["way"] == outcome.model.name
            ]
            assert {sample["index"] for sample in read_metrics(path)} == {item.index for item in run.task.items()}


def test_a_score_does_not_depend_on_the_batch(sections, tmp_path):
    sections["gsm8k"] |= {"temperature": 0.7, "repeats": 2}
    alone = run_tasks(tiny_pair(), QualityConfig(tasks=sections, batch_size=1), tmp_path / "alone", quiet=True)
    together = run_tasks(tiny_pair(), QualityConfig(tasks=sections, batch_size=4), tmp_path / "together", quiet=True)
    ours, theirs = samples_of(alone), samples_of(together)
    assert len(ours) == 2 * 5 * 2 + 2 * 2 + 3 * 3 + 3 * 3
    same(ours, theirs)
    texts = {sample["completion"] for key, sample in ours.items() if key[0] == "gsm8k" and key[2] == 0}
    assert len(texts) == 4  # two ways, two draws: repeats draw from seeds of their own


def test_a_kill_loses_only_what_was_in_flight(sections, tmp_path, monkeypatch):
    tasks = {"gsm8k": sections["gsm8k"]}
    settings = QualityConfig(tasks=tasks, batch_size=2)
    whole = samples_of(run_tasks(tiny_pair(), settings, tmp_path / "whole", quiet=True))
    kind, judged = TASKS["gsm8k"], []
    judge = kind.judge

    def dying(self, item, text):
        judged.append(item.index)
        if len(judged) == 8:
            raise KeyboardInterrupt
        return judge(self, item, text)

    monkeypatch.setattr(kind, "judge", dying)
    with pytest.raises(KeyboardInterrupt):
        run_tasks(tiny_pair(), settings, tmp_path / "cut", quiet=True)
    files = sorted((tmp_path / "cut").glob("*.jsonl"))
    kept = [sample for file in files for sample in read_metrics(file)]
    assert len(kept) == 7
    with files[-1].open("a") as file:  # as a kill inside a write leaves it
        file.write('{"index": 0, "rep')
    judged.clear()
    monkeypatch.setattr(kind, "judge", lambda self, item, text: (judged.append(item.index), judge(self, item, text))[1])
    again = samples_of(run_tasks(tiny_pair(), settings, tmp_path / "cut", quiet=True))
    assert len(judged) == 3
    same(again, whole)


def test_more_items_go_on_where_fewer_ended_and_other_settings_are_refused(sections, tmp_path, monkeypatch):
    tasks = {"gsm8k": sections["gsm8k"]}
    run_tasks(tiny_pair(), QualityConfig(tasks=tasks, limit=2), tmp_path / "out", quiet=True)
    asked: list[int] = []
    write = ParentEvalModel.write
    monkeypatch.setattr(
        ParentEvalModel,
        "write",
        lambda self, prompts, *more: (asked.append(len(prompts)), write(self, prompts, *more))[1],
    )
    runs = run_tasks(tiny_pair(), QualityConfig(tasks=tasks, limit=4), tmp_path / "out", quiet=True)
    assert asked == [2] and [len(outcome.samples) for outcome in runs[0].outcomes] == [4, 4]
    fewer = run_tasks(tiny_pair(), QualityConfig(tasks=tasks, limit=1), tmp_path / "out", quiet=True)
    assert asked == [2] and [len(outcome.samples) for outcome in fewer[0].outcomes] == [1, 1]
    changed = {"gsm8k": {**tasks["gsm8k"], "max_new_tokens": 11}}
    with pytest.raises(ConfigError, match="max_new_tokens was 10, is 11") as caught:
        run_tasks(tiny_pair(), QualityConfig(tasks=changed, limit=4), tmp_path / "out", quiet=True)
    assert "--out" in caught.value.hint
    decoders = {"S_MODE": {**MODES["S_MODE"], "tau_mask": 0.4}}
    with pytest.raises(ConfigError, match="tau_mask was 0.5, is 0.4"):
        run_tasks(tiny_pair(), QualityConfig(tasks=tasks, decoders=decoders), tmp_path / "out", quiet=True)
    rows = [{"question": "Other?", "answer": "#### 1"}] * 5
    lines(tmp_path / "gsm8k" / "test.jsonl", rows)
    with pytest.raises(ConfigError, match="data was"):
        run_tasks(tiny_pair(), QualityConfig(tasks=tasks), tmp_path / "out", quiet=True)


def test_the_same_data_elsewhere_are_the_same_data_and_other_weights_are_not(sections, tmp_path):
    tasks = {"gsm8k": sections["gsm8k"]}
    run_tasks(tiny_pair(), QualityConfig(tasks=tasks, limit=1), tmp_path / "out", quiet=True)
    moved = {"gsm8k": {**tasks["gsm8k"], "data": gsm8k_folder(tmp_path / "moved")}}
    run_tasks(tiny_pair(), QualityConfig(tasks=moved, limit=1), tmp_path / "out", quiet=True)
    pair = tiny_pair()
    weight = pair.parent.causal_lm.model.norm.weight
    with torch.no_grad():
        weight += 0.5
    try:
        with pytest.raises(ConfigError, match="weights was"):
            run_tasks(pair, QualityConfig(tasks=tasks, limit=1), tmp_path / "out", quiet=True)
    finally:
        with torch.no_grad():
            weight -= 0.5


@pytest.fixture(scope="module")
def twins():
    """The embedded parent, and the same weights as a diffusion model of block size 1."""
    model, tokenizer = start_conversion("tiny", "parent", 1, torch.float64)
    parent = Parent(model.causal_lm, tokenizer, model.banned)
    return ModelPair(model, tokenizer, parent)


def test_the_parent_writes_what_its_block_size_1_twin_writes(twins):
    """The same text, tokens, end and number of forwards: stop strings and the end of text mean the same to both."""
    (theirs, ours) = twins.writing({"one": {"name": "threshold_edit", "tau_mask": 1.0, "tau_edit": None}})
    prompts = [ours.encode(text) for text in ("Once upon a time", "The end of the story was", "Tom", "She said:")]
    reasons = set()
    for stops in ((), (" the",), (".", "!"), ("\n",)):
        ask = GenerationParams(max_new_tokens=24, stops=stops)
        results: dict[str, dict[int, object]] = {"ours": {}, "theirs": {}}
        ours.write(prompts, ask, [0] * 4, results["ours"].__setitem__)
        theirs.write(prompts, ask, [0] * 4, results["theirs"].__setitem__)
        for row in range(4):
            a, b = results["ours"][row], results["theirs"][row]
            assert (a.text, a.tokens, a.finish_reason) == (b.text, b.tokens, b.finish_reason)
            reasons.add(a.finish_reason)
    assert {"stop", "length"} <= reasons


def test_wall_seconds_add_up_and_leave_out_what_is_done_with_an_answer(twins):
    import time

    for way in twins.writing({"one": {"name": "threshold_edit", "tau_mask": 1.0, "tau_edit": None}}):
        answers = []

        def slow(row, answer, answers=answers):
            answers.append(answer)
            time.sleep(0.3)

        begun = time.perf_counter()
        way.write([way.encode("Once")] * 3, GenerationParams(max_new_tokens=4), [0] * 3, slow)
        whole = time.perf_counter() - begun
        assert sum(answer.wall_seconds for answer in answers) <= whole - 0.85
        assert max(answer.seconds for answer in answers) <= whole - 0.85


def test_a_mask_token_in_an_answer_is_counted_and_fails_the_verb(sections, tmp_path, monkeypatch, capsys):
    from hildanext.eval import models as eval_models

    mask_id = tiny_pair().model.card.mask_id

    def broken(model, tokenizer, prompts, decoder, settings, on_event, on_completion, seeds):
        stats = GenerationStats(1, 2, 0, 0, tokens=3, edits=0, seconds=0.1, prefill_seconds=0.0)
        for row in range(len(prompts)):
            on_completion(row, GenerationResult([5, mask_id, 6], "x", "length", stats))

    monkeypatch.setattr(eval_models, "generate", broken)
    settings = QualityConfig(tasks={"gsm8k": sections["gsm8k"]}, limit=2)
    result, _ = run_session(tiny_pair(), {}, settings, tmp_path / "out", quiet=True)
    assert mask_tokens(result) == 2
    print_tasks(result)
    assert "2 mask tokens were emitted" in capsys.readouterr().out
    place = sections["gsm8k"]["data"]
    arguments = ["eval", "--tasks", f"gsm8k={place}", "--limit", "1", "--out", str(tmp_path / "verb"), "--quiet"]
    more = ["--set", "eval.quality.tasks.gsm8k.few_shot=0", "--set", "eval.quality.tasks.gsm8k.max_new_tokens=4"]
    assert main([*arguments, *more]) == 1


def test_the_table_holds_scores_intervals_and_differences(sections, tmp_path, capsys):
    settings = QualityConfig(tasks=sections, limit=3)
    result, files = run_session(tiny_pair(), {"model": "tiny"}, settings, tmp_path / "out", quiet=True)
    report = json.loads(files["json"].read_text())
    assert [task["key"] for task in report["tasks"]] == list(sections)
    gsm8k, stories = report["tasks"][0], report["tasks"][2]
    parent, ours = gsm8k["ways"]
    assert parent["name"] == "AR parent" and "over_parent" not in parent["scores"]["strict"]
    assert ours["scores"]["strict"]["over_parent"].keys() == {"value", "low", "high", "items", "p"}
    assert ours["settings"]["decoder"]["tau_mask"] == 0.5 and ours["settings"]["block_size"] == 8
    assert sum(ours["cost"]["lengths"].values()) == 3 and ours["cost"]["mask_tokens"] == 0
    nats, perplexity = (stories["ways"][0]["scores"][name]["value"] for name in ("nats/token", "perplexity"))
    assert perplexity == pytest.approx(torch.tensor(nats).exp().item(), rel=1e-5)
    assert (
        stories["ways"][2]["details"]["se_of_masks_in_nats"] > 0 == stories["ways"][1]["details"]["se_of_masks_in_nats"]
    )
    for name in ("tasks", "perplexity", "lengths"):
        assert files[name].stat().st_size > 5000
    print_tasks(result)
    shown = capsys.readouterr().out
    for word in (
        "gsm8k (3)",
        "AR parent",
        "S_MODE",
        "tau_mask 0.5",
        "block_size 8",
        "float64",
        "threads",
        "0 mask tokens",
    ):
        assert word in shown


def test_the_parent_alone_and_the_model_alone_may_be_asked(sections, tmp_path):
    pair, tasks = tiny_pair(), {"gsm8k": sections["gsm8k"], "tinystories": sections["tinystories"]}
    alone = ModelPair(None, pair.tokenizer, pair.parent)
    result = summarise(run_tasks(alone, QualityConfig(tasks=tasks, limit=1), tmp_path / "a", quiet=True))
    assert [[way["name"] for way in task["ways"]] for task in result["tasks"]] == [["AR parent"]] * 2
    alone = ModelPair(pair.model, pair.tokenizer, None)
    result = summarise(run_tasks(alone, QualityConfig(tasks=tasks, limit=1), tmp_path / "b", quiet=True))
    assert [len(task["ways"]) for task in result["tasks"]] == [1, 2]
    assert "over_parent" not in result["tasks"][0]["ways"][0]["scores"]["strict"]


def test_a_prompt_that_does_not_fit_is_refused_or_loses_examples_for_all_alike(sections, tmp_path):
    long = {**sections["gsm8k"], "few_shot": 5, "max_new_tokens": 890}
    with pytest.raises(PromptError, match="gsm8k-test-.*exceed the context of 1024"):
        run_tasks(tiny_pair(), QualityConfig(tasks={"gsm8k": long}), tmp_path / "out", quiet=True)
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True
    from hildanext.eval.runner import _prompts

    task = build("task", TASKS, {"name": "gsm8k", **long, "overlong": "fewer_shots"})
    models = tiny_pair().writing(MODES)
    fitted = _prompts(task, task.items(), models)
    assert all(0 < prompt.shots < 5 for prompt in fitted)
    for prompt in fitted:
        assert len(models[0].encode(prompt.text)) <= 1024 - 890 and prompt.text.endswith("\nAnswer:")
        assert prompt.text.count("Question: ") == prompt.shots + 1


class TestConfig:
    @pytest.mark.parametrize(
        "tasks, word",
        [
            ({}, "no tasks"),
            ({"gsm8q": {}}, "did you mean 'gsm8k'"),
            ({"gsm8k": {"few_shots": 2}}, "did you mean 'few_shot'"),
            ({"gsm8k": {"repeats": 3}}, "greedy answers"),
            ({"math500": {"few_shot": 5}}, "few_shot"),
            ({"math500": {"chat": True}}, "few_shot 0"),
            ({"tinystories": {"block_sizes": [0]}}, "block_sizes"),
            ({"tinystories": {"draws": 1}}, "draws"),
            ({"twice": {"name": "gsm8k"}, "again": {"name": "gsm9k"}}, "did you mean 'gsm8k'"),
        ],
    )
    def test_what_is_wrong_is_named(self, tasks, word):
        with pytest.raises(HildaError, match=word):
            QualityConfig(tasks=tasks)

    def test_a_task_may_run_twice_under_two_keys(self):
        built = QualityConfig(tasks={"a": {"name": "gsm8k", "few_shot": 0}, "gsm8k": {}}).build()
        assert [task.few_shot for task in built.values()] == [0, 5]


class TestVerb:
    @pytest.mark.parametrize(
        "arguments, word",
        [
            (["--tasks", "gsm9k"], "did you mean 'gsm8k'"),
            (["--tasks", "gsm8k=nowhere.jsonl"], "no benchmark data at 'nowhere.jsonl'"),
            (["--tasks", "gsm8k", "--mode", "quick"], "unknown mode"),
            (["--tasks", "gsm8k", "--limit", "0"], "limit"),
            (["--model", "none", "--parent", "none", "--tasks", "gsm8k"], "neither a model nor a parent"),
            (["--model", "none", "--text", "x.txt"], "diffusion model"),
            ([], "nothing to evaluate"),
            (["--tasks", "gsm8k", "--allow-unsafe-execution"], "without programs"),
        ],
    )
    def test_a_mistake_is_one_line_and_exit_2(self, arguments, word, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert main(["eval", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and word in error

    def test_it_goes_from_flags_to_files(self, sections, tmp_path, capsys):
        out, samples = tmp_path / "out", tmp_path / "elsewhere"
        flags = ["--tasks", f"tinystories={sections['tinystories']['data']}", "--limit", "2", "--batch-size", "2"]
        places = ["--out", str(out), "--samples-out", str(samples), "--set", "eval.quality.tasks.tinystories.draws=2"]
        assert main(["eval", "--model", "tiny", *flags, *places, "--dtype", "fp32"]) == 0
        report = json.loads((out / "quality.json").read_text())
        assert report["model"] == "tiny" and report["settings"]["tasks"]["tinystories"]["draws"] == 2
        assert len(list(samples.glob("*.jsonl"))) == 3 and "tinystories (2)" in capsys.readouterr().out


def a_stage(section: dict, folder) -> dict:
    context = StageContext(folder=folder, key="eval", device="cpu", dtype="fp32", threads=1, parent="tiny")
    eval_stage.check(section, context)
    return eval_stage.stage(section, context)


def test_a_recipe_s_stage_runs_tasks_without_held_out_data(sections, tmp_path):
    stories = {"tinystories": sections["tinystories"]}
    outcome = a_stage({"model": "tiny", "quality": {"tasks": stories, "limit": 1}}, tmp_path)
    report = json.loads((tmp_path / "eval" / "quality.json").read_text())
    assert outcome["tasks"] == str(tmp_path / "eval" / "quality.json") and "results" not in outcome
    assert [way["name"] for way in report["tasks"][0]["ways"]][0] == "AR parent"
    assert outcome["pictures"] == [str(tmp_path / "eval" / "perplexity.png")]
    page = write_report(tmp_path, {"eval": outcome}, "a run").read_text(encoding="utf-8")
    assert "<h2>Tasks</h2>" in page and "tinystories (1)" in page and "diffusion, block 8, bound" in page
    for wrong, word in (({"tasks": {"gsm9k": {}}}, "gsm8k"), ({"task": {}}, "did you mean 'tasks'")):
        with pytest.raises(HildaError, match=word):
            a_stage({"model": "tiny", "quality": wrong}, tmp_path)


def test_as_a_chat_the_question_goes_through_the_template(sections, tmp_path):
    pair = tiny_pair()
    section = {**sections["gsm8k"], "few_shot": 0, "chat": True, "max_new_tokens": 4}
    settings = QualityConfig(tasks={"gsm8k": section}, limit=1)
    with pytest.raises(ConfigError, match="no chat template"):
        run_tasks(pair, settings, tmp_path / "out", quiet=True)
    pair.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<a>"
    try:
        (run,) = run_tasks(pair, settings, tmp_path / "out", quiet=True)
        prompt = f"<user>{QUESTIONS[0][0]}</user><a>"
        assert {o.samples[0]["prompt"] for o in run.outcomes} == {prompt}
        fed = encode_chat(pair.tokenizer, [Message("user", QUESTIONS[0][0])])
        assert encode_prompt(pair.tokenizer, prompt) == fed, "token for token what fine-tuning trained on"
        pair.tokenizer.chat_template += " "
        with pytest.raises(ConfigError, match="chat_template was"):
            run_tasks(pair, settings, tmp_path / "out", quiet=True)
    finally:
        pair.tokenizer.chat_template = None


def test_a_checkpoint_of_fine_tuning_is_asked_in_its_template_unless_told_otherwise(sections, tmp_path):
    pair = tiny_pair()
    before, pair.tokenizer.chat_template = pair.model.card, "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    bare = {name: value for name, value in sections["gsm8k"].items() if name not in ("few_shot", "chat")}
    tasks = {"bare": bare, "shown": {**bare, "few_shot": 2}, "plain": {**bare, "few_shot": 0, "chat": False}}
    tasks = {key: {**section, "name": "gsm8k", "max_new_tokens": 2} for key, section in tasks.items()}
    try:
        assert as_taught(QualityConfig(tasks=tasks), pair).tasks == tasks, "a converted model is asked as its parent is"
        pair.model.card = replace(before, chat=True)
        result, _ = run_session(pair, {}, QualityConfig(tasks=tasks, limit=1), tmp_path / "out", quiet=True)
    finally:
        pair.model.card, pair.tokenizer.chat_template = before, None
    knobs = {task["key"]: (task["knobs"]["chat"], task["knobs"]["few_shot"]) for task in result["tasks"]}
    assert knobs == {"bare": (True, 0), "shown": (False, 2), "plain": (False, 0)}
    asked = {
        key: {read_metrics(path)[-1]["prompt"] for path in (tmp_path / "out" / "samples").glob(f"{key}--*.jsonl")}
        for key in tasks
    }
    question = QUESTIONS[0][0]
    assert asked["bare"] == {f"<{question}>"}, "the parent is asked the same"
    assert asked["plain"] == {f"Question: {question}\nAnswer:"} and question in next(iter(asked["shown"]))
    settings_lines = [line for line in table_lines(result) if line.startswith("bare, ")]
    assert len(settings_lines) == 2 and all(
        "chat True, few_shot 0" in line or "few_shot 0" in line for line in settings_lines
    )


def test_a_journal_keeps_its_sessions(tmp_path):
    for threads in (1, 2, 1):
        with Journal(tmp_path, "t", "w", {"a": 1}, {"threads": threads}) as journal:
            journal.add({"index": threads, "repeat": 0})
    assert journal.sessions == [{"threads": 1}, {"threads": 2}] and sorted(journal.samples) == [(1, 0), (2, 0)]


def test_a_way_without_a_decoder_does_not_write():
    pair = tiny_pair()
    with pytest.raises(NotImplementedError, match="no decoder"):
        DiffusionEvalModel(pair.model, pair.tokenizer, "scores").write([[1]], GenerationParams(4), [0], print)


def test_data_that_are_no_gsm8k_rows_are_refused(tmp_path):
    place = lines(tmp_path / "test.jsonl", [{"question": QUESTIONS[0][0], "answer": "seven"}])
    with pytest.raises(DataError, match="no '#### N'"):
        build("task", TASKS, {"name": "gsm8k", "data": place}).items()
