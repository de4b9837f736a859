"""Sets of problems: what each reads or makes, what is refused and where, and the split."""

import gzip
import json

import datasets
import pytest

from hildanext.core.errors import ConfigError, DataError
from hildanext.core.registry import build
from hildanext.data.problems import PROBLEMS
from hildanext.data.problems.base import is_held_out
from hildanext.data.problems.mbpp import entry_point
from hildanext.data.problems.puzzle_texts import expression_of
from hildanext.grading import REWARDS, checked_scores
from hildanext.grading.sandbox.run import probe
from hildanext.grading.sudoku import solutions

isolated = pytest.mark.skipif(probe().level == 0, reason=f"no isolation here: {probe().why_not_higher()}")

GSM8K = {"question": "How many  eggs?", "answer": "16+2=<<16+2=18>>18\n#### 18"}
MATH = {"problem": "What is $1/2$?", "solution": "so $\\boxed{\\frac12}$", "unique_id": "a/1.json"}
HUMANEVAL = {
    "task_id": "Own/0",
    "prompt": "def add(a, b):\n",
    "entry_point": "add",
    "test": "def check(c):\n    pass\n",
}
MBPP = {
    "task_id": 601,
    "text": "Write a function to add two numbers.",
    "code": "import math\ndef add(a, b):\n    return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert math.isclose(add(0.1, 0.2), 0.3)"],
    "test_setup_code": "import math",
}
COUNTDOWN = {"numbers": [3, 5, 7], "target": 22}
SUDOKU = {"puzzle": "3102200002100320", "solution": "3142243142131324"}
ROWS = {
    "gsm8k": GSM8K,
    "math": MATH,
    "humaneval": HUMANEVAL,
    "mbpp": MBPP,
    "countdown_files": COUNTDOWN,
    "sudoku_files": SUDOKU,
    "jsonl": {"prompt": "?", **COUNTDOWN},
}
MADE = ("countdown", "sudoku", "arithmetic")


def written(folder, *rows, name="train.jsonl"):
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"
    file = folder / name
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(file)


def problems(name, **knobs):
    return build("problems", PROBLEMS, {"name": name, **knobs})


def reward(name, **knobs):
    return build("reward", REWARDS, {"name": name, **knobs})


def own_reward(members):
    return reward(members.reward or "countdown")


class TestFiles:
    def test_all_members_are_here(self):
        assert set(ROWS) | set(MADE) == set(PROBLEMS)

    @pytest.mark.parametrize("name", ROWS)
    @pytest.mark.parametrize("file", ["train.jsonl", "train.jsonl.gz", "train.json"])
    def test_a_row_becomes_a_problem_that_its_reward_takes(self, tmp_path, name, file):
        rows = [f"[{json.dumps(ROWS[name])}]"] if file.endswith(".json") else [ROWS[name]]
        members = problems(name, path=written(tmp_path, *rows, name=file))
        (problem,) = members.read(own_reward(members))
        assert problem.prompt and problem.identity and problem.id
        assert problem.where == ("train.json record 1" if file == "train.json" else f"{file} line 1")

    @pytest.mark.parametrize("name", ROWS)
    def test_whatever_field_is_missing_is_named_with_its_line(self, tmp_path, name):
        members = problems(name, path=written(tmp_path, ROWS[name], "", {"other": 1}))
        with pytest.raises(DataError, match=r"^train.jsonl line 3"):
            members.read(own_reward(members))

    def test_what_the_reward_needs_is_named_with_its_line(self, tmp_path):
        members = problems("jsonl", path=written(tmp_path, {"prompt": "?", **COUNTDOWN}, {"prompt": "?"}))
        with pytest.raises(DataError, match="line 2: a Countdown problem without 'numbers'"):
            members.read(reward("countdown"))
        assert len(members.read(reward("format"))) == 2

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("{", "line 2: broken JSON"),
            ("[1]", "line 2 holds list"),
            ('{"prompt": " "}', "line 2 has no text 'prompt'"),
        ],
    )
    def test_no_line_is_left_out_in_silence(self, tmp_path, line, said):
        members = problems("jsonl", path=written(tmp_path, {"prompt": "?"}, line))
        with pytest.raises(DataError, match=said):
            members.read(reward("format"))

    def test_no_file_and_no_rows_are_errors(self, tmp_path):
        with pytest.raises(DataError, match="no such file"):
            problems("gsm8k", path=str(tmp_path / "none.jsonl")).read(reward("gsm8k"))
        with pytest.raises(DataError, match="the problems are none"):
            problems("gsm8k", path=written(tmp_path, "")).read(reward("gsm8k"))

    def test_a_limit_a_template_and_a_name(self, tmp_path):
        path = written(tmp_path, MATH, {"prompt": "never read"})
        (problem,) = problems("math", path=path, limit=1, template="Q: {prompt}\nA:").read(reward("math"))
        assert problem.prompt == "Q: What is $1/2$?\nA:" and problem.id == "a/1.json"
        assert problems("math", path=path, limit=1).read(reward("math"))[0].prompt.endswith("\\boxed{}.")
        for template in ("none", "{prompt}{prompt}"):
            with pytest.raises(ConfigError, match="stand in it once"):
                problems("math", path=path, template=template)

    def test_gsm8k_may_come_from_the_hub(self, monkeypatch):
        asked = []

        def hub(name, subset, split, **options):
            asked.append((name, subset, split))
            return datasets.Dataset.from_list([{**GSM8K, "question": f"{n}?"} for n in range(40)]).to_iterable_dataset()

        monkeypatch.setattr(datasets, "load_dataset", hub)
        made = problems("gsm8k", dataset="openai/gsm8k", subset="main", part="train[10:]", limit=20)
        split = made.split(reward("gsm8k"))
        assert asked == [("openai/gsm8k", "main", "train")] and len(split.train) + len(split.held_out) == 20
        assert {one.prompt for one in (*split.train, *split.held_out)} == {f"{n}?" for n in range(10, 30)}
        with pytest.raises(DataError, match="split 'test' of openai/gsm8k is a test set"):
            problems("gsm8k", dataset="openai/gsm8k", part="test").split(reward("gsm8k"))
        for both in ({}, {"path": "a.jsonl", "dataset": "openai/gsm8k"}):
            with pytest.raises(ConfigError, match="give one of the two"):
                problems("gsm8k", **both)

    def test_gsm8k_s_answer_is_written_without_annotations(self, tmp_path):
        (problem,) = problems("gsm8k", path=written(tmp_path, GSM8K)).read(reward("gsm8k"))
        assert problem.answer == "16+2=18\n#### 18" and problem.identity == "How many eggs?"

    def test_rewards_and_problems_that_do_not_fit_are_told(self, tmp_path):
        members = problems("countdown", count=4, answer="tags")
        assert members.read(reward("countdown", answer="tags"))
        with pytest.raises(
            DataError, match="countdown 1: the right answer '<answer>.*earns nothing under CountdownReward"
        ):
            members.read(reward("countdown"))
        path = written(tmp_path, {"prompt": "?", **COUNTDOWN, "gold": "3+4"})
        with pytest.raises(DataError, match="earns nothing"):
            problems("jsonl", path=path, answer_field="gold").read(reward("countdown"))


class TestMbpp:
    def test_a_row_is_one_of_humaneval_s_shape_and_shows_its_tests(self, tmp_path):
        (problem,) = problems("mbpp", path=written(tmp_path, MBPP)).read(reward("code"))
        assert problem.row["entry_point"] == "add" and problem.row["prompt"] == "" and problem.id == "601"
        assert "assert add(1, 2) == 3" in problem.prompt and problem.row["test"].startswith("import math\n")

    @isolated
    def test_its_own_solution_passes_and_another_does_not(self, tmp_path):
        (problem,) = problems("mbpp", path=written(tmp_path, MBPP)).read(reward("code"))
        answers = [problem.answer, "def add(a, b):\n    return a + b\n", "```python\ndef add(a, b): return 3\n```"]
        scores, _ = checked_scores(reward("code", limits={"seconds": 20}), [problem.row] * 3, answers)
        assert scores == [1.0, 1.0, 0.0]

    def test_the_function_is_found_with_and_without_a_solution(self):
        tests = ["assert set(sqrt(add(1, 2))) == {3}"]
        test = "from math import sqrt\ndef check(candidate):\n    " + tests[0]
        assert entry_point(tests, test, None, "here") == "add"
        assert entry_point(tests, test, "def add(a, b): return a\ndef other(): pass", "here") == "add"
        with pytest.raises(DataError, match="here: its tests call no function"):
            entry_point(["assert True"], "def check(c): pass", None, "here")
        with pytest.raises(DataError, match="no Python"):
            entry_point(["assert ("], "def check(c): pass", None, "here")

    def test_bad_tests_are_named(self, tmp_path):
        for tests in ("assert f()", [1], [], None):
            with pytest.raises(DataError, match="line 1.*test_list"):
                problems("mbpp", path=written(tmp_path, {**MBPP, "test_list": tests})).read(reward("code"))


class TestPuzzles:
    @pytest.mark.parametrize(
        ("row", "numbers", "target", "answer"),
        [
            (COUNTDOWN, [3, 5, 7], 22, None),
            ({"nums": [3, 5, 7], "target": 22}, [3, 5, 7], 22, None),
            ({"input": "30,100,93", "output": "23"}, [30, 100, 93], 23, None),
            ({"input": "15,44,79,50", "output": "44-15=29,79-29=50"}, [15, 44, 79], 50, "79-(44-15)"),
        ],
    )
    def test_countdown_is_read_in_each_of_its_forms(self, tmp_path, row, numbers, target, answer):
        (problem,) = problems("countdown_files", path=written(tmp_path, row)).read(reward("countdown"))
        assert (problem.row["numbers"], problem.row["target"], problem.answer) == (numbers, target, answer)

    @pytest.mark.parametrize(
        "row", [{"input": "a,b", "output": "3"}, {"input": "1,2"}, {"numbers": [1.5], "target": 2}]
    )
    def test_other_forms_are_named_with_their_line(self, tmp_path, row):
        with pytest.raises(DataError, match=r"train.jsonl line 1"):
            problems("countdown_files", path=written(tmp_path, row)).read(reward("countdown"))

    def test_steps_become_an_expression(self):
        assert expression_of("2+2=4,4*4=16") == "(2+2)*4"  # one result is used once, the other 4 is given
        assert expression_of("1+2=3,4+5=9,3*9=27") == "(1+2)*(4+5)"
        assert expression_of("1+2") is None and expression_of("1+2=3,4+5=9") is None

    def test_sudoku_is_read_from_csv_and_its_lines_are_named(self, tmp_path):
        path = written(tmp_path, "Puzzle,Solution", "3102200002100320,3142243142131324", name="train.csv")
        (problem,) = problems("sudoku_files", path=path).read(reward("sudoku"))
        assert problem.row == SUDOKU and problem.answer == SUDOKU["solution"] and SUDOKU["puzzle"] in problem.prompt
        path = written(tmp_path, "Puzzle,Solution", "3102200002100320,3142243142131324", "31", name="train.csv")
        with pytest.raises(DataError, match="train.csv line 3: a Sudoku without"):
            problems("sudoku_files", path=path).read(reward("sudoku"))

    def test_made_puzzles_depend_on_seed_and_index_alone(self):
        for name in MADE:
            few, many = (list(problems(name, count=count, seed=3).problems()) for count in (3, 6))
            assert many[:3] == few and list(problems(name, count=3, seed=4).problems()) != few

    @pytest.mark.parametrize("place", ["whole", "marker", "tags"])
    @pytest.mark.parametrize("name", ["countdown", "sudoku"])
    def test_every_made_answer_earns_all(self, name, place):
        read = problems(name, count=50, answer=place, template="{prompt}").read(reward(name, answer=place))
        scores, _ = checked_scores(
            reward(name, answer=place), [problem.row for problem in read], [problem.answer for problem in read]
        )
        assert scores == [1.0] * 50

    def test_made_countdown_keeps_its_knobs(self):
        knobs = {"numbers": 4, "smallest": 2, "largest": 12, "largest_target": 30, "operations": ["+", "*"]}
        for problem in problems("countdown", count=50, **knobs).problems():
            assert len(problem.row["numbers"]) == 4 and set(problem.row["numbers"]) <= set(range(2, 13))
            assert 0 < problem.row["target"] <= 30 and not set("-/") & set(problem.answer)
        with pytest.raises(ConfigError, match="no target up to 3"):
            list(problems("countdown", smallest=9, largest_target=3, operations=["+"]).problems())
        with pytest.raises(ConfigError, match="smallest 9 above largest 5"):
            problems("countdown", smallest=9, largest=5)

    @pytest.mark.parametrize("blanks", [1, 6, 12])
    def test_made_sudokus_have_their_blanks_and_one_solution(self, blanks):
        for problem in problems("sudoku", count=10, blanks=blanks).problems():
            assert problem.row["puzzle"].count("0") == blanks
            assert solutions(problem.row["puzzle"]) == (problem.row["solution"],)


class TestSplit:
    def test_it_is_stable_and_a_larger_share_holds_the_smaller(self):
        names = [f"problem {number}" for number in range(4000)]
        few, many = ({name for name in names if is_held_out(name, share)} for share in (0.1, 0.3))
        assert few < many and abs(len(few) / 4000 - 0.1) < 0.02 and abs(len(many) / 4000 - 0.3) < 0.03
        assert sorted(few)[:3] == ["problem 1011", "problem 1021", "problem 1022"]  # of every version to come
        assert not any(is_held_out(name, 0.0) for name in names)

    @pytest.mark.parametrize("name", MADE)
    def test_no_problem_is_on_both_sides_and_no_sum_or_grid_either(self, name):
        members = problems(name, count=400, held_out=0.2)
        split = members.split(own_reward(members))
        trained, held = ({problem.identity for problem in side} for side in (split.train, split.held_out))
        assert trained and held and not trained & held and len(split.train) + len(split.held_out) == 400
        assert split.test_set is None and split.facts() == {
            "train": len(split.train),
            "held_out": len(split.held_out),
            "fingerprint": split.fingerprint,
        }

    def test_held_out_sums_are_told_in_no_story_of_the_training(self):
        split = problems("arithmetic", count=400, largest=5, steps=1, held_out=0.3).split(reward("gsm8k"))
        answers = {problem.row["answer"] for problem in split.train}
        assert not answers & {problem.row["answer"] for problem in split.held_out}

    def test_a_split_is_the_same_whatever_stands_beside_a_problem(self, tmp_path):
        rows = [{"prompt": f"problem {number}"} for number in range(60)]
        ways = {}
        for name, order in (("a.jsonl", rows), ("b.jsonl", rows[::-1]), ("c.jsonl", rows[:40])):
            split = problems("jsonl", path=written(tmp_path, *order, name=name), held_out=0.5).split(reward("format"))
            ways[name] = {problem.prompt for problem in split.held_out}
        assert ways["a.jsonl"] == ways["b.jsonl"] and ways["c.jsonl"] == ways["a.jsonl"] & {
            r["prompt"] for r in rows[:40]
        }

    def test_the_fingerprint_is_of_what_is_asked_and_judged(self):
        def fingerprint(**knobs):
            return problems("countdown", count=50, **knobs).split(reward("countdown")).fingerprint

        assert fingerprint() == fingerprint()
        others = [{"seed": 1}, {"held_out": 0.3}, {"template": "Now: {prompt}"}, {"largest_target": 90}]
        assert len({fingerprint(), *(fingerprint(**other) for other in others)}) == 5

    def test_an_empty_side_is_an_error(self, tmp_path):
        members = problems("jsonl", path=written(tmp_path, {"prompt": "problem 0"}))
        with pytest.raises(DataError, match="leaves 1 to train on and 0 held out"):
            members.split(reward("format"))
        assert len(problems("jsonl", path=members.path, held_out=0.0).split(reward("format")).train) == 1
        with pytest.raises(ConfigError, match="held_out"):
            problems("jsonl", path=members.path, held_out=1.0)


class TestTestSets:
    @pytest.mark.parametrize(
        ("name", "row", "file"),
        [
            ("humaneval", {**HUMANEVAL, "task_id": "HumanEval/0"}, "train.jsonl"),
            ("humaneval", {key: HUMANEVAL[key] for key in ("prompt", "entry_point", "test")}, "train.jsonl"),
            ("humaneval", HUMANEVAL, "HumanEval.jsonl.gz"),
            ("jsonl", {**HUMANEVAL, "task_id": "HumanEval/0"}, "train.jsonl"),
            ("mbpp", {**MBPP, "task_id": 11}, "train.jsonl"),
            ("mbpp", {**MBPP, "task_id": 510}, "train.jsonl"),
            ("gsm8k", GSM8K, "test.jsonl"),
            ("countdown_files", COUNTDOWN, "countdown3_test.jsonl"),
        ],
    )
    def test_training_on_one_is_refused_or_marked(self, tmp_path, name, row, file):
        path = written(tmp_path, row, name=file)
        members = problems(name, path=path, held_out=0.0)
        judge = reward("code") if "entry_point" in row else own_reward(members)
        with pytest.raises(DataError, match="is a test set: .*allow_test_set"):
            members.split(judge)
        assert len(members.read(judge)) == 1  # to be judged on it is fine
        split = problems(name, path=path, held_out=0.0, allow_test_set=True).split(judge)
        assert split.test_set and split.facts()["test_set"] == split.test_set

    def test_others_are_not_marked(self, tmp_path):
        for name, row, file in (
            ("humaneval", HUMANEVAL, "train.jsonl"),
            ("mbpp", MBPP, "train.jsonl"),
            ("gsm8k", GSM8K, "latest.jsonl"),
        ):
            members = problems(name, path=written(tmp_path, row, name=file), held_out=0.0, allow_test_set=True)
            assert members.split(own_reward(members)).test_set is None


class TestRealData:
    def test_gsm8k(self, real_data):
        split = problems("gsm8k", path=str(real_data / "gsm8k" / "train.jsonl")).split(reward("gsm8k"))
        assert len(split.train) + len(split.held_out) == 7473 and 650 < len(split.held_out) < 850
        with pytest.raises(DataError, match="'test.jsonl' is a test set"):
            problems("gsm8k", path=str(real_data / "gsm8k" / "test.jsonl")).split(reward("gsm8k"))

    def test_humaneval(self, real_data):
        members = problems("humaneval", path=str(real_data / "humaneval" / "HumanEval.jsonl.gz"))
        assert len(members.read(reward("code"))) == 164
        with pytest.raises(DataError, match="HumanEval is a test set"):
            members.split(reward("code"))

    def test_every_published_countdown_has_an_answer_that_earns_all(self, real_data):
        members = problems("countdown_files", path=str(real_data / "planning" / "countdown3_test.jsonl"))
        read = members.read(reward("countdown"))
        scores, _ = checked_scores(reward("countdown"), [p.row for p in read], [p.answer for p in read])
        assert scores == [1.0] * 1000

    def test_a_quarter_of_the_published_sudokus_has_more_than_one_solution(self, real_data):
        members = problems("sudoku_files", path=str(real_data / "planning" / "sudoku4x4_test.csv"))
        read = members.read(reward("sudoku"))
        scores, _ = checked_scores(reward("sudoku"), [p.row for p in read], [p.answer for p in read])
        assert scores == [1.0] * 500
        assert sum(len(solutions(problem.row["puzzle"])) > 1 for problem in read) == 124
