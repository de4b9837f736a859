r"""The arithmetic under the tasks: intervals by hand, what a `\boxed{}` holds, which option wins, what a file says."""

import gzip
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hildanext.core.errors import ConfigError, DataError
from hildanext.core.registry import build
from hildanext.core.statistics import (
    Values,
    bootstrap,
    interval,
    mcnemar,
    paired_bootstrap,
    paired_interval,
    pass_at_k,
    wilson,
)
from hildanext.eval import summary, task_tables
from hildanext.eval.tasks import TASKS, Task
from hildanext.eval.tasks.math500 import EXAMPLES
from hildanext.eval.tasks.records import beside, fingerprint, read_records
from hildanext.grading import computer_algebra
from hildanext.grading.math_answers import boxed, canonical, normalised, official, stated
from hildanext.likelihood.conditional import Scored
from quality_fixtures import CHOICES, QUESTIONS, STORIES, gsm8k_folder, lines, stories_file, tiny_pair


def values(*numbers: float) -> Values:
    return Values(np.array(numbers, dtype=float), np.ones(len(numbers)))


class TestIntervals:
    @pytest.mark.parametrize(
        "successes, trials, low, high",
        [(0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (8, 10, 0.49016, 0.94331), (62, 100, 0.52209, 0.70902)],
    )
    def test_wilson_s_interval(self, successes, trials, low, high):
        """Solves |p - x| = z sqrt(p (1 - p) / n) for p."""
        interval = wilson(successes, trials)
        assert interval == pytest.approx((low, high), abs=2e-5)
        share = successes / trials
        for edge in interval:
            if 1e-9 < edge < 1 - 1e-9:
                assert abs(edge - share) == pytest.approx(1.959964 * math.sqrt(edge * (1 - edge) / trials), rel=1e-5)

    def test_right_or_wrong_gets_wilson_s_and_the_rest_the_bootstrap(self):
        assert interval(values(1, 0, 1, 1)) == wilson(3, 4)
        some = values(0.5, 0.25, 0.75, 1.0)
        assert interval(some) == bootstrap(some) and interval(some).low < 0.625 < interval(some).high
        assert all(math.isnan(edge) for edge in interval(values()))

    def test_the_bootstrap_of_a_mean_is_near_the_normal_one_and_weighs_items(self):
        drawn = np.random.default_rng(3).normal(5.0, 2.0, 400)
        interval = bootstrap(Values(drawn, np.ones(400)))
        spread = 1.96 * drawn.std(ddof=1) / 20
        assert interval == pytest.approx((drawn.mean() - spread, drawn.mean() + spread), abs=0.06)
        assert bootstrap(Values(drawn, np.ones(400))) == interval  # a seed of its own
        heavy = Values(np.array([10.0, 90.0]), np.array([1.0, 30.0]))
        assert heavy.mean == pytest.approx(100 / 31) and bootstrap(heavy) == pytest.approx((3.0, 10.0))

    def test_pairs_are_drawn_together(self):
        """Where the two differ by the same amount everywhere, nothing is uncertain about the difference."""
        theirs = values(*np.random.default_rng(1).normal(0, 5, 50))
        ours = Values(theirs.values + 0.5, theirs.weights)
        assert paired_bootstrap(ours, theirs) == pytest.approx((0.5, 0.5))
        assert paired_interval(ours, theirs) == pytest.approx((0.5, 0.5))

    def test_the_difference_of_two_shares(self):
        """Agresti and Min: 3 and 1 discordant of 20, half an item in each cell: d = (3.5 - 1.5) / 22."""
        ours = values(*[1] * 3, 0, *[1] * 10, *[0] * 6)
        theirs = values(*[0] * 3, 1, *[1] * 10, *[0] * 6)
        spread = 1.959964 * math.sqrt(5.0 / 22 - (2 / 22) ** 2) / math.sqrt(22)
        assert paired_interval(ours, theirs) == pytest.approx((2 / 22 - spread, 2 / 22 + spread), abs=1e-6)
        none = paired_interval(values(0, 0, 0, 0), values(0, 0, 0, 0))
        assert none.low == -none.high < -0.2  # four items that agree prove little

    @pytest.mark.parametrize("here, there, p", [(0, 0, 1.0), (1, 8, 0.0390625), (5, 5, 1.0), (0, 10, 2 / 1024)])
    def test_mcnemar_s_exact_p(self, here, there, p):
        ours, theirs = [1.0] * here + [0.0] * there + [1.0], [0.0] * here + [1.0] * there + [1.0]
        assert mcnemar(ours, theirs) == pytest.approx(p) == mcnemar(theirs, ours)

    def test_mcnemar_of_very_many_items_is_a_number(self):
        assert 0 < mcnemar([1.0] * 700 + [0.0] * 600, [0.0] * 700 + [1.0] * 600) < 0.01

    @pytest.mark.parametrize(
        "n, c, k, want",
        [(10, 3, 1, 0.3), (10, 3, 5, 0.9166667), (10, 0, 5, 0), (10, 10, 1, 1), (5, 1, 5, 1), (200, 1, 100, 0.5),
         (2, 1, 1, 0.5), (10, 6, 5, 1), (20, 5, 10, 0.9837461)],
    )  # fmt: skip
    def test_pass_at_k(self, n, c, k, want):
        assert pass_at_k(n, c, k) == pytest.approx(want, abs=1e-7)
        with pytest.raises(ValueError):
            pass_at_k(2, 1, 3)


needs_math_verify = pytest.mark.skipif(
    computer_algebra.installed_version() is None, reason="math-verify is an extra of evaluation"
)


@pytest.fixture(scope="module")
def algebra():
    return computer_algebra.ComputerAlgebra()


class TestMath:
    def test_a_list_is_right_with_all_its_entries(self):
        assert canonical("1, 0.50", "1,0.5") and not canonical("1", "1,0.5") and not canonical("1,0.5,2", "1,0.5")

    @pytest.mark.parametrize(
        "text, want",
        [
            (r"so $\boxed{5}$.", "5"),
            (r"\boxed{1} or \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
            (r"\boxed{\left\{ x : {x} > 0 \right\}}", r"\left\{ x : {x} > 0 \right\}"),
            (r"\fbox{7}", "7"),
            (r"$\boxed 42$", "42"),
            (r"\boxed{never closed", None),
            ("no box", None),
            ("", None),
        ],
    )
    def test_the_last_box_with_its_braces(self, text, want):
        assert boxed(text) == want

    @pytest.mark.parametrize(
        "answer, gold, rule",
        [
            ("5", "5", "official"),
            (r"\dfrac12", r"\frac{1}{2}", "official"),
            (r"\tfrac{1}{2}", r"\frac12", "official"),
            ("1/2", r"\frac{1}{2}", "official"),
            ("0.5", r"\frac{1}{2}", "official"),
            (".75", "0.75", "official"),
            (r"\sqrt3", r"\sqrt{3}", "official"),
            (r"x = 5", "5", "official"),
            (r"90^\circ", "90", "official"),
            (r"12\text{ cm}", "12", "official"),
            (r"50\%", "50", "official"),
            (r"\$18", "18", "official"),
            (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", "official"),
            (r"\frac1{72}", r"\frac{1}{72}", "official"),
            ("0.25", r"\frac{1}{4}", "canonical"),
            ("1,000", "1000", "canonical"),
            ("2.0", "2", "canonical"),
            (r"-\frac{6}{4}", "-1.5", "canonical"),
            (r"(0.50, 1)", r"\left(\frac{2}{4}, 1\right)", "canonical"),
            ("4", "2+2", None),
            ("5", "6", None),
            ("(1,2)", "[1,2]", None),
            ("(1,2)", "(1,2,3)", None),
            (r"\frac{1}{0}", r"\frac{2}{0}", None),
            (None, "1", None),
            ("", "1", None),
            ("1" * 50, "1" * 49 + "2", None),
        ],
    )
    def test_which_answers_are_the_same(self, answer, gold, rule):
        assert official(answer, gold) is (rule == "official")
        assert canonical(answer, gold) is (rule is not None)

    @pytest.mark.parametrize(
        "hostile", ["\\boxed{" * 5000, "{" * 100_000, "\\frac" * 20_000, "1," * 50_000, "(" * 9_000]
    )
    def test_no_answer_takes_long(self, hostile):
        begun = time.process_time()
        for text in (hostile, "\\boxed{" + hostile + "}", "The final answer is " + hostile):
            canonical(boxed(text) or stated(text) or text, "(1,2)")
        assert time.process_time() - begun < 0.5

    @needs_math_verify
    @pytest.mark.parametrize(
        "answer, gold, equal",
        [
            ("2+2", "4", True),
            ("x^2-1", "(x-1)(x+1)", True),
            (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}", True),
            (r"2\sqrt{3}", r"\sqrt{12}", True),
            ("2,1", "1,2", True),
            (r"\text{even}", "even", True),
            (r"12\text{ cm}", "12", True),
            ("5", "6", False),
            ("(1,2)", "[1,2]", False),
            ("(2,1)", "(1,2)", False),
            ("x^2+1", "(x-1)(x+1)", False),
            ("0.333", r"\frac{1}{3}", False),
            (r"\frac{1}{0}", r"\frac{2}{0}", False),
            ("}", "5", False),
            ("", "5", False),
            (None, "5", False),
        ],
    )
    def test_which_formulas_are_equal(self, algebra, answer, gold, equal):
        assert algebra.equal(answer, gold) is equal
        assert equal or not official(answer, gold)

    @needs_math_verify
    def test_an_answer_without_end_is_cut_off_and_the_next_one_judged(self, tmp_path):
        """In a thread, where math-verify's own clock does not work; the product of a factorial hears no signal."""
        algebra = computer_algebra.ComputerAlgebra(seconds=1.0)
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(algebra.equal, "4", "2+2").result()
            first = algebra._program._process
            begun = time.monotonic()
            assert thread.submit(algebra.equal, "10000000000!", "1").result() is None
            assert time.monotonic() - begun < 5 and first.returncode is not None
            assert thread.submit(algebra.equal, "4", "2+2").result()

    @needs_math_verify
    def test_its_program_ends_with_it(self):
        algebra = computer_algebra.ComputerAlgebra()
        assert algebra.equal("1", "1")
        process = algebra._program._process
        del algebra
        assert process.returncode is not None

    def test_a_math_verify_that_does_not_start_is_said_so(self, tmp_path, monkeypatch):
        program = tmp_path / "worker.py"
        program.write_text("raise SystemExit(1)")
        monkeypatch.setattr(computer_algebra, "WORKER", program)
        with pytest.raises(ConfigError, match="math-verify does not start"):
            computer_algebra.ComputerAlgebra().equal("1", "1")

    def test_without_math_verify_its_column_says_so_and_nothing_stands_in_for_it(self, tmp_path, monkeypatch):
        monkeypatch.setattr(computer_algebra, "installed_version", lambda: None)
        place = lines(tmp_path / "test.jsonl", [{"problem": "What is $1+1$?", "answer": "2"}])
        task = build("task", TASKS, {"name": "math500", "data": place})
        judged = task.judge(task.items()[0], "\\boxed{2}")
        assert judged.scores == {"official": 1.0, "canonical": 1.0} and task.facts() == {"math-verify": "not installed"}
        items = {name: {0: (score, 1.0)} for name, score in judged.scores.items()}
        notes = {metric.name: summary._note(task, metric, items) for metric in task.metrics}
        assert notes == {"official": {}, "canonical": {}, "math_verify": {"note": "math-verify is not installed"}}
        score = summary._score(task.metrics[2], items, None) | notes["math_verify"]
        assert task_tables._with_range(score, True) == "math-verify is not installed"

    def test_a_column_that_was_judged_for_some_items_alone_says_for_how_many(self):
        items = {"official": {at: (1.0, 1.0) for at in range(3)}, "math_verify": {2: (1.0, 1.0)}}
        task = build("task", TASKS, {"name": "math500", "data": "x"})
        assert summary._note(task, task.metrics[2], items) == {"note": "1 of 3 items"}

    def test_the_worked_examples_box_what_they_state(self):
        for _, solution in EXAMPLES:
            assert normalised(boxed(solution)) == normalised(stated(solution))

    def test_prompts(self, tmp_path):
        place = lines(tmp_path / "test.jsonl", [{"problem": "What is $1+1$?", "answer": "2", "unique_id": "a/1.json"}])
        few = build("task", TASKS, {"name": "math500", "data": place})
        (item,) = few.items()
        prompt = few.prompt(item, 4)
        assert item.id == "a/1.json" and prompt.count("Problem:\n") == 5
        assert prompt.startswith("Problem:\nFind the domain") and prompt.endswith(
            "\n\nProblem:\nWhat is $1+1$?\n\nSolution:"
        )
        none = build("task", TASKS, {"name": "math500", "data": place, "few_shot": 0})
        assert none.prompt(item, 0).startswith("What is $1+1$?\nPlease reason") and "\\boxed{}" in none.prompt(item, 0)
        judged = few.judge(item, "It is \\boxed{2.0}.")
        assert {**judged.scores, "math_verify": 1.0} == {"official": 0.0, "canonical": 1.0, "math_verify": 1.0}
        assert judged.extraction["answer"] == "2.0"
        said = few.judge(item, "Final Answer: The final answer is $2$. I hope it is correct.")
        assert said.scores["official"] == 0.0 and said.scores["canonical"] == 1.0 and not said.extraction["boxed"]
        assert ("math_verify" in said.scores) is (computer_algebra.installed_version() is not None)
        assert few.metrics[0].name == "official"  # the published rule stays the headline

    def test_a_row_without_an_answer_is_refused(self, tmp_path):
        place = lines(tmp_path / "test.jsonl", [{"problem": "?", "solution": "no box"}])
        with pytest.raises(DataError, match="neither 'answer' nor a boxed solution"):
            build("task", TASKS, {"name": "math500", "data": place}).items()


class TestGsm8k:
    def test_the_prompt_and_the_four_rules(self, tmp_path):
        task = build("task", TASKS, {"name": "gsm8k", "data": gsm8k_folder(tmp_path), "few_shot": 2})
        items = task.items()
        prompt = task.prompt(items[0], 2)
        assert prompt.endswith(f"\n\nQuestion: {QUESTIONS[0][0]}\nAnswer:") and prompt.count("\nAnswer: It is ") == 2
        assert task.prompt(items[0], 0) == f"Question: {QUESTIONS[0][0]}\nAnswer:"
        assert task.prompt(items[1], 2).split("Question: A box")[0] != prompt.split("Question: Tom")[0]
        assert task.judge(items[2], "So $1,000.").scores == {"strict": 0, "flexible": 1, "official": 0, "canonical": 0}
        assert task.judge(items[2], "#### 1000.0").scores == {"strict": 0, "flexible": 0, "official": 0, "canonical": 1}

    def test_the_examples_are_those_that_the_harness_draws(self, tmp_path):
        """Its generator (seed 1234) drew [6, 3], [0, 6], [0, 4] of seven examples; compared with it in test_harness."""
        task = build("task", TASKS, {"name": "gsm8k", "data": gsm8k_folder(tmp_path), "few_shot": 2})
        for item, (first, second) in zip(task.items(), [(6, 3), (0, 6), (0, 4)], strict=False):
            shots = [f"Question: What is {n}+1?\nAnswer: It is {n + 1}.\n#### {n + 1}" for n in (first, second)]
            assert task.prompt(item, 2) == "\n\n".join([*shots, f"Question: {item.record['question']}\nAnswer:"])

    def test_as_a_chat_the_bare_question_is_asked(self, tmp_path):
        task = build("task", TASKS, {"name": "gsm8k", "data": gsm8k_folder(tmp_path), "few_shot": 0, "chat": True})
        assert task.prompt(task.items()[0], 0) == QUESTIONS[0][0]

    def test_too_few_examples_are_refused(self, tmp_path):
        task = build("task", TASKS, {"name": "gsm8k", "data": gsm8k_folder(tmp_path), "few_shot": 9})
        with pytest.raises(ConfigError, match="9 worked examples of 7"):
            task.prompt(task.items()[0], 9)


def scored(*nats: float) -> list[Scored]:
    return [Scored(value, 0.0, 1, "exact", 1) for value in nats]


class TestMultipleChoice:
    def task(self, place: str, **knobs: object) -> Task:
        return build("task", TASKS, {"name": "multiple_choice", "data": place, **knobs})

    def test_the_lowest_number_wins_and_per_byte_a_longer_option_may(self, tmp_path):
        task = self.task(lines(tmp_path / "test.jsonl", CHOICES), style="text")
        item = task.items()[1]  # "a dog" (gold) and "the big old cat": 6 and 16 bytes with their space
        assert task.weigh(item, scored(6.0, 9.0)).scores == {"acc": 1.0, "acc_norm": 0.0}
        assert task.weigh(item, scored(6.0, 5.0)).scores == {"acc": 0.0, "acc_norm": 0.0}
        assert task.weigh(item, scored(3.0, 16.0)).scores == {"acc": 1.0, "acc_norm": 1.0}

    def test_letters_are_asked_as_mmlu_asks(self, tmp_path):
        task = self.task(lines(tmp_path / "test.jsonl", CHOICES))
        item = task.items()[0]
        head = "The following are multiple choice questions (with answers) about sky.\n\n"
        assert task.prompt(item) == f"{head}What colour is the sky?\nA. red\nB. blue\nC. green\nD. black\nAnswer:"
        way = tiny_pair().parent_models()[0]
        pairs = task.pairs(item, way.encode, 7)
        context = tuple(way.encode(task.prompt(item)))
        assert [way.tokenizer.decode(list(pair.continuation)) for pair in pairs] == [" A", " B", " C", " D"]
        assert {pair.context for pair in pairs} == {context} and {pair.seed for pair in pairs} == {7}

    def test_worked_examples_are_the_first_of_the_subject(self, tmp_path):
        lines(tmp_path / "dev.jsonl", [{**CHOICES[1], "subject": "sea"}, CHOICES[2], CHOICES[1]])
        task = self.task(lines(tmp_path / "test.jsonl", CHOICES), few_shot=1)
        assert "What do you eat?\nA. a cake\nB. a car\nC. the sun\nAnswer: A\n\nWhat colour" in task.prompt(
            task.items()[0]
        )
        many = self.task(str(tmp_path / "test.jsonl"), few_shot=3)
        with pytest.raises(ConfigError, match="2 worked examples for the subject 'sky'"):
            many.prompt(many.items()[0])

    def test_mmlu_s_own_csv_has_no_header(self, tmp_path):
        (tmp_path / "test.csv").write_text('"Which, of these?",one,two,three,four,C\nSecond?,a,b,c,d,A\n')
        items = self.task(str(tmp_path)).items()
        assert [(item.record["question"], item.record["choices"], item.record["gold"]) for item in items] == [
            ("Which, of these?", ["one", "two", "three", "four"], 2), ("Second?", ["a", "b", "c", "d"], 0)
        ]  # fmt: skip

    @pytest.mark.parametrize(
        "row, word",
        [
            ({"choices": ["a", "b"], "answer": 0}, "no text 'question'"),
            ({"question": "?", "answer": 0}, "no choices"),
            ({"question": "?", "choices": ["a", "b"], "answer": 2}, "has the answer 2"),
            ({"question": "?", "choices": ["a", "b"], "answer": "Z"}, "has the answer 'Z'"),
        ],
    )
    def test_rows_that_are_no_questions_are_refused(self, row, word, tmp_path):
        with pytest.raises(DataError, match=word):
            self.task(lines(tmp_path / "test.jsonl", [row])).items()


class TestTinyStories:
    def test_a_story_is_scored_from_its_beginning_and_cut(self, tmp_path):
        task = build("task", TASKS, {"name": "tinystories", "data": stories_file(tmp_path / "a.txt"), "max_tokens": 5})
        items = task.items()
        assert [item.record["text"] for item in items] == STORIES
        way = tiny_pair().parent_models()[0]
        (pair,) = task.pairs(items[0], way.encode, 0)
        assert pair.context == (way.tokenizer.bos_token_id,)
        assert list(pair.context + pair.continuation) == way.encode(STORIES[0])[:6]

    def test_items_are_weighted_by_their_tokens(self, tmp_path):
        task = build("task", TASKS, {"name": "tinystories", "data": lines(tmp_path / "a.jsonl", [{"text": "Hi"}])})
        sample = {"scores": {"nats": 12.0}, "extraction": {"tokens": 4, "mask_se": 0.5}}
        assert set(task.values([sample]).values()) == {(12.0, 4.0)}
        assert task.details([sample, sample])["se_of_masks_in_nats"] == pytest.approx(math.sqrt(0.5) / 8)


class TestRows:
    def test_a_file_a_folder_and_gzip_say_the_same(self, tmp_path):
        rows = [{"a": 1}, {"a": 2}]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "test.jsonl").write_text(text)
        (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        (tmp_path / "list.json").write_text(json.dumps(rows))
        (tmp_path / "t.csv").write_text("question,a\nq,1\n")
        for place in (tmp_path, tmp_path / "test.jsonl", tmp_path / "x.jsonl.gz", tmp_path / "list.json"):
            assert read_records(str(place), "test") == rows
        assert read_records(str(tmp_path / "t.csv"), "test") == [{"question": "q", "a": "1"}]
        assert beside(str(tmp_path / "x.jsonl.gz"), "test") == str(tmp_path / "test.jsonl")
        assert beside("owner/name", "train") == "owner/name"
        assert fingerprint(rows) == fingerprint([{"a": 1}, {"a": 2}]) != fingerprint([{"a": 2}, {"a": 1}])

    @pytest.mark.parametrize(
        "name, content, word",
        [
            ("a.jsonl", b'{"a": 1}\n{"a": \n', "line 2"),
            ("a.jsonl", b"[1]\n", "line 1 holds list"),
            ("a.json", b"[[1]]", "row 1 holds list"),
            ("a.jsonl", b"", "holds no rows"),
            ("a.jsonl", b"\xff\xfe", "cannot read"),
            ("a.jsonl.gz", b"\x1f\x8bbroken", "cannot read"),
        ],
    )
    def test_broken_files_are_named(self, name, content, word, tmp_path):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=word):
            read_records(str(tmp_path / name), "test")

    def test_a_hub_that_is_out_of_reach_says_what_to_do(self, monkeypatch):
        import datasets

        def unreachable(*_: object, **__: object) -> None:
            raise ConnectionError("no route")

        monkeypatch.setattr(datasets, "load_dataset", unreachable)
        with pytest.raises(DataError, match="cannot open the data set 'openai/gsm8k'") as caught:
            build("task", TASKS, {"name": "gsm8k"}).items()
        assert "local file" in caught.value.hint
        with pytest.raises(DataError, match="no benchmark data"):
            read_records("no/such/file.jsonl", "test")
        with pytest.raises(DataError, match="holds no train"):
            beside(__file__, "train")
