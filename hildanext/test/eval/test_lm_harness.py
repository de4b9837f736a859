"""The adapter for lm-evaluation-harness: the same answers as our own ways, its real tasks offline from local files."""

import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from hildanext.ar import Parent
from hildanext.cli import main
from hildanext.core.errors import ConfigError, DataError, HildaError
from hildanext.core.registry import build
from hildanext.decoding import MODES
from hildanext.eval.lm_harness import HarnessAdapter, adapter_class, from_arguments, subjects
from hildanext.eval.lm_harness_run import HarnessConfig, load_tasks, local_files, print_harness, run_harness
from hildanext.eval.models import GenerationParams, ModelPair
from hildanext.eval.tasks import TASKS
from hildanext.likelihood.conditional import Pair, score_parent
from hildanext.models.start import start_conversion
from quality_fixtures import gsm8k_folder, lines, tiny_pair

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason='lm-eval is not installed (pip install "hildanext[eval]")'
)


def request(*args: object) -> SimpleNamespace:
    return SimpleNamespace(args=args)


@pytest.fixture(scope="module")
def twins() -> ModelPair:
    """The embedded parent, and its weights as a diffusion model of block size 8 that has not been trained."""
    model, tokenizer = start_conversion("tiny", "parent", 8, torch.float64)
    return ModelPair(model, tokenizer, Parent(model.causal_lm, tokenizer, model.banned))


def adapter(contestants: ModelPair, subject: str = "diffusion", block_size: int | None = None) -> HarnessAdapter:
    writer, scorer = subjects(contestants, MODES["S_MODE"], block_size, 4)[subject]
    return HarnessAdapter(writer, scorer, batch_size=3, max_gen_toks=12)


@pytest.mark.parametrize("subject", ["parent", "diffusion"])
def test_texts_are_the_way_s_own_in_the_order_of_the_requests(subject):
    lm = adapter(tiny_pair(), subject)
    long = "Once upon a time there was a girl and " * 4
    asked = [
        request("Tom", {"until": ["."], "do_sample": False, "temperature": 0.0}),
        request(long, {"until": ".", "max_gen_toks": 20}),
        request("The sun", {"until": ["."], "do_sample": False, "temperature": 0.0}),
        request("Tom", {}),
    ]
    texts = lm.generate_until(asked)
    for text, (prompt, ask) in zip(
        texts, [("Tom", (12, (".",))), (long, (20, (".",))), ("The sun", (12, (".",))), ("Tom", (12, ()))], strict=True
    ):
        want = {}
        lm.writer.write([lm.writer.encode(prompt)], GenerationParams(*ask), [0], want.__setitem__)
        assert text == want[0].text
    assert texts[3].startswith(texts[0]) and "." not in texts[0] + texts[1] + texts[2]


def test_a_context_that_is_too_long_loses_its_beginning():
    lm = adapter(tiny_pair(), "parent")
    words = "the cat sat on a mat and " * 400
    (text,) = lm.generate_until([request(words, {})])
    kept = lm.writer.encode(words)[-(1024 - 12) :]
    want = {}
    lm.writer.write([kept], GenerationParams(12), [0], want.__setitem__)
    assert text == want[0].text
    ((logp, greedy),) = lm.loglikelihood([request(words, " mat")])
    assert logp < 0 and greedy is False


@pytest.mark.parametrize(
    "kwargs, word", [({"repetition_penalty": 1.2}, "repetition_penalty"), ({"max_gen_toks": 1024}, "no room")]
)
def test_what_decoding_cannot_do_is_refused(kwargs, word):
    with pytest.raises(ConfigError, match=word):
        adapter(tiny_pair()).generate_until([request("Tom", kwargs)])


def test_sampling_is_off_unless_it_is_asked_for():
    lm = adapter(tiny_pair())
    assert lm._params({"do_sample": False, "temperature": 1.0}).temperature == 0.0
    asked = lm._params({"temperature": 0.7, "top_p": 0.9, "until": None, "max_new_tokens": 5})
    assert asked == GenerationParams(max_new_tokens=5, stops=(), temperature=0.7, top_p=0.9)


def test_before_training_exact_likelihoods_are_the_parent_s(twins):
    asked = [("Once upon a", " time"), ("Tom had a ", "dog."), ("", "The end of the story"), ("Tom", " ran and ran")]
    theirs = adapter(twins, "parent").loglikelihood([request(*pair) for pair in asked])
    ours = adapter(twins, "diffusion", 1).loglikelihood([request(*pair) for pair in asked])
    assert [logp for logp, _ in ours] == pytest.approx([logp for logp, _ in theirs], abs=1e-9)
    bounds = adapter(twins, "diffusion").loglikelihood([request(*pair) for pair in asked])
    assert abs(bounds[3][0] - theirs[3][0]) > 1e-3


def test_a_context_s_trailing_space_goes_to_the_continuation(twins):
    lm, encode = adapter(twins, "parent"), twins.parent_models()[0].encode
    context, whole = encode("Tom had a"), encode("Tom had a dog.")
    (want,) = score_parent(twins.parent, [Pair(tuple(context), tuple(whole[len(context) :]))])
    ((log_likelihood, _),) = lm.loglikelihood([request("Tom had a ", "dog.")])
    assert log_likelihood == pytest.approx(-want.nats, abs=1e-9)


def test_continuations_of_one_context_share_their_masks():
    lm = adapter(tiny_pair())
    one, again, other = lm.loglikelihood(
        [request("A", " big dog ran"), request("A", " big dog ran"), request("B", " x")]
    )
    assert one == again != other


def test_chat_and_processes():
    lm = adapter(tiny_pair(), "parent")
    assert lm.rank == 0 and lm.world_size == 1 and lm.gather_object({"a": 1}) == [{"a": 1}]
    assert torch.equal(lm.all_gather(torch.tensor(3)), torch.tensor(3)) and lm.barrier() is None
    assert lm.tokenizer_name and "/" not in lm.tokenizer_name
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    with pytest.raises(ConfigError, match="no chat template"):
        lm.apply_chat_template(said)
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    lm.tokenizer.chat_template = template
    try:
        assert lm.apply_chat_template(said) == "<user>Hi\n<assistant>Yes\n<a>"
        assert lm.apply_chat_template(said, add_generation_prompt=False).endswith("<assistant>Yes")
        assert lm.chat_template(True) == template and lm.chat_template(False) is None
    finally:
        lm.tokenizer.chat_template = None


def test_without_the_package_one_line_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    out = ["--out", str(tmp_path)]
    assert main(["eval", "--harness", "gsm8k", "--harness-data", gsm8k_folder(tmp_path / "g"), *out]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "hildanext[eval]" in error


def test_local_files_are_found_by_split(tmp_path):
    folder = gsm8k_folder(tmp_path / "data" / "gsm8k")
    for place in (tmp_path / "data", tmp_path / "data" / "gsm8k"):
        overrides = local_files(place, "gsm8k")
        assert overrides["dataset_path"] == "json" and overrides["dataset_name"] is None
        assert overrides["dataset_kwargs"]["data_files"] == {
            name: f"{folder}/{name}.jsonl" for name in ("train", "test")
        }
    with pytest.raises(DataError, match="no file of a split"):
        local_files(tmp_path, "other")
    (tmp_path / "data" / "gsm8k" / "dev.csv").write_text("a,b\n")
    with pytest.raises(DataError, match="several kinds"):
        local_files(tmp_path / "data", "gsm8k")


@pytest.mark.parametrize(
    "arguments, word",
    [({"batch_size": "auto"}, "batch_size"), ({"subject": "both"}, "subject"), ({"mode": "quick"}, "unknown mode")],
)
def test_model_arguments_are_checked(arguments, word):
    with pytest.raises(HildaError, match=word):
        from_arguments(**arguments)


def test_the_harness_s_default_device_is_no_wish(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert from_arguments(device="cuda:0", dtype="fp32")["writer"].model.device.type == "cpu"
    assert "cuda:0 is not there" in caplog.text
    with pytest.raises(ConfigError, match="'cuda:1' is not there"):
        from_arguments(device="cuda:1")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Data sets are built in a folder of the test's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    datasets.disable_progress_bars()
    return tmp_path


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
class TestWithTheHarness:
    def test_our_gsm8k_prompts_are_its_own_character_for_character(self, offline):
        folder = gsm8k_folder(offline / "gsm8k")
        (task,) = load_tasks(["gsm8k"], folder)
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=None, rank=0, world_size=1)
        ours = build("task", TASKS, {"name": "gsm8k", "data": folder})
        assert len(task.instances) == 5
        for item, instance in zip(ours.items(), task.instances, strict=True):
            prompt, settings = instance.args
            assert ours.prompt(item, 5) == prompt and prompt.count("Question: ") == 6
            assert tuple(settings["until"]) == ours.stops and settings["do_sample"] is False

    def test_its_own_task_gives_our_scores(self, offline, monkeypatch, capsys):
        """With scripted answers: its filters and our rules agree, item by item, for both models."""
        from hildanext.eval import models as eval_models

        answers = ["#### 7", "so 24.", "#### 1000", "#### 5", "nothing"]
        monkeypatch.setattr(HarnessAdapter, "generate_until", lambda self, requests: answers[: len(requests)])
        folder = gsm8k_folder(offline / "gsm8k")
        settings = HarnessConfig(tasks=("gsm8k",), data=folder, num_fewshot=2)
        result = run_harness(tiny_pair(), settings, offline / "out")
        values = {(row["subject"], row["filter"]): row["value"] for row in result["results"]}
        task = build("task", TASKS, {"name": "gsm8k", "data": folder})
        judged = [task.judge(item, text).scores for item, text in zip(task.items(), answers, strict=True)]
        for name, own in (("strict-match", "strict"), ("flexible-extract", "flexible")):
            want = sum(scores[own] for scores in judged) / 5
            assert values["parent", name] == values["diffusion", name] == pytest.approx(want) and 0 < want < 1
        assert json.loads((offline / "out" / "harness.json").read_text())["results"]
        assert len((offline / "out" / "harness" / "gsm8k--parent.jsonl").read_text().splitlines()) == 2 * 5
        print_harness(result)
        assert "strict-match" in capsys.readouterr().out and eval_models is not None

    def test_it_is_registered_and_answers_all_three_requests(self, offline):
        kind = adapter_class()
        assert adapter_class() is kind
        lm = kind.create_from_arg_string("model=tiny,mode=Q_MODE,tau_edit=off,max_gen_toks=8", {"batch_size": 2})
        from lm_eval.api.registry import get_model

        assert get_model("hilda") is kind
        assert lm.writer.settings["decoder"] == {**MODES["Q_MODE"], "tau_edit": None} and lm.batch_size == 2
        text = "Tom had a dog. " * 120
        (whole,) = lm.loglikelihood_rolling([request(text)])
        ids = lm._ids(text)
        assert len(ids) > 500 and whole < -50
        assert isinstance(lm.generate_until([request("Tom", {"until": ["."]})])[0], str)

    def test_a_text_longer_than_the_context_is_the_sum_of_its_windows(self, offline, twins):
        lm = adapter(twins, "parent")
        text = "Tom had a dog and a cat. " * 200
        ids = lm._ids(text)
        first = lm.scorer.context - 1
        assert first < len(ids) < 2 * first
        prefix = tuple(lm._prefix())
        # Disjoint windows: the second sees as much of the first as fits beside it.
        start = len(ids) - first - 1
        pairs = [Pair(prefix, tuple(ids[:first])), Pair(tuple(ids[start:first]), tuple(ids[first:]))]
        want = -sum(score.nats for score in score_parent(twins.parent, pairs))
        assert lm.loglikelihood_rolling([request(text)]) == pytest.approx([want], abs=1e-6)

    def test_unknown_tasks_and_missing_data_say_what_to_do(self, offline):
        with pytest.raises(ConfigError, match="no task 'gsm9k'"):
            load_tasks(["gsm9k"], gsm8k_folder(offline / "gsm8k"))
        with pytest.raises(DataError, match="gsm9k"):
            load_tasks(["gsm9k"], None)
        (offline / "bad").mkdir()
        lines(offline / "bad" / "test.jsonl", [{"question": "?"}])
        with pytest.raises(DataError, match="cannot load 'gsm8k'"):
            load_tasks(["gsm8k"], str(offline / "bad"))

    @pytest.mark.slow
    def test_two_processes_share_the_items(self, offline):
        folder = gsm8k_folder(offline / "gsm8k")
        command = [
            "eval",
            "--harness",
            "gsm8k",
            "--harness-data",
            folder,
            "--out",
            str(offline / "out"),
            "--dtype",
            "fp32",
        ]
        more = ["--set", "eval.harness.num_fewshot=1", "--set", "eval.harness.max_gen_toks=8", "--threads", "1"]
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29631"]
        done = subprocess.run([*launch, "-m", "hildanext.cli", *command, *more], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        report = json.loads((offline / "out" / "harness.json").read_text())
        assert report["processes"] == 2 and {row["items"] for row in report["results"]} == {5}
        assert len((offline / "out" / "harness" / "gsm8k--diffusion.jsonl").read_text().splitlines()) == 2 * 5
