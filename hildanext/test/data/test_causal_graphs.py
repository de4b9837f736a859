"""Causal graphs: their format, what makes them, and the tokens they link."""

import copy
import json
import os
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hildanext.cli import main
from hildanext.core.errors import ConfigError, DataError, UnknownChoice
from hildanext.core.registry import build
from hildanext.data.causal_graphs import EXTRACTORS, read_graph
from hildanext.data.causal_graphs.corpus import GRAPHS, GraphExample, find_example, read_example, write_graphs
from hildanext.data.causal_graphs.equations import without_annotations
from hildanext.data.causal_graphs.explain import Piece, marked, pair_places
from hildanext.data.causal_graphs.graph import Edge, find_cycle
from hildanext.data.causal_graphs.numbers import NUMBER_WORDS, evaluate, number_words, numerals, written
from hildanext.data.causal_graphs.picture import COLUMNS, Sheet, wrapped
from hildanext.data.causal_graphs.statistics import ROWS, table
from hildanext.data.causal_graphs.teacher import occurrences
from hildanext.data.causal_graphs.tokens import TokenPair, placed, token_pairs
from hildanext.data.sources.base import Report
from hildanext.data.sources.chat.arithmetic import Arithmetic
from hildanext.models.loading.tiny import folder
from hildanext.tokenization import load_tokenizer

CASES = [  # every extractor, once mild and once harsh
    {"name": "rule:gsm8k"},
    {"name": "rule:gsm8k", "strict": True},
    {"name": "rule:arith"},
    {"name": "rule:arith", "strict": True},
    {"name": "json:teacher"},
    {"name": "json:teacher", "strict": True, "field": "links"},
]

NATALIA = {
    "question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?",
    "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72",
}
GRAPH = {
    "version": 1,
    "source": "rule:gsm8k",
    "nodes": [
        {"id": "q0", "kind": "given", "value": "48", "spans": [["prompt", 22, 24]]},
        {"id": "e0", "kind": "intermediate", "value": "24", "spans": [["response", 20, 22], ["response", 53, 55]]},
        {"id": "e1", "kind": "intermediate", "value": "72", "spans": [["response", 58, 60]]},
        {"id": "f", "kind": "final", "value": "72", "spans": [["response", 101, 103]]},
    ],
    "edges": [
        {"from": "q0", "to": "e0", "kind": "operand", "weight": 1.0, "ambiguous": False},
        {"from": "q0", "to": "e1", "kind": "operand", "weight": 1.0, "ambiguous": False},
        {"from": "e0", "to": "e1", "kind": "operand", "weight": 1.0, "ambiguous": False},
        {"from": "e1", "to": "f", "kind": "copy", "weight": 1.0, "ambiguous": False},
    ],
}
RESPONSE = "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May.\n#### 72"
FIELDS = {"prompt": NATALIA["question"], "response": RESPONSE}


def gsm8k(answer: str, question: str = "", strict: bool = False):
    return EXTRACTORS["rule:gsm8k"](strict=strict).extract({"question": question, "answer": answer})


def links(extraction) -> list[tuple[str, str, bool]]:
    return [] if extraction.graph is None else [(e.cause, e.effect, e.ambiguous) for e in extraction.graph.edges]


def test_annotations_of_an_example_become_the_graph_written_by_hand():
    """The operand 2 is a constant: no edge. The texts are those as trained."""
    extraction = EXTRACTORS["rule:gsm8k"]().extract(NATALIA)
    assert extraction.graph.to_json() == GRAPH
    assert (extraction.prompt, extraction.response) == (NATALIA["question"], RESPONSE)
    assert extraction.counts["operands: constants"] == 1


def test_a_wrong_annotation_is_dropped():
    wrong = {**NATALIA, "answer": NATALIA["answer"].replace("<<48/2=24>>", "<<48/2=25>>")}
    extraction = EXTRACTORS["rule:gsm8k"]().extract(wrong)
    assert extraction.counts["wrong equations"] == 1
    assert links(extraction) == [("q0", "e0", False), ("e0", "f", False)]
    assert extraction.graph.node("e0").value == "72"


def test_a_graph_with_a_cycle_is_rejected():
    graph = copy.deepcopy(GRAPH)
    graph["edges"].append({"from": "f", "to": "e0"})
    with pytest.raises(DataError, match="run in a circle, e0 -> e1 -> f -> e0"):
        read_graph(graph, FIELDS)
    with pytest.raises(DataError, match="circle, q0 -> q0"):
        read_graph({**GRAPH, "edges": [{"from": "q0", "to": "q0"}]}, FIELDS)


def test_a_graph_survives_reading_and_writing():
    assert read_graph(json.loads(json.dumps(GRAPH)), FIELDS).to_json() == GRAPH


def broken(path: list, value) -> dict:
    graph = copy.deepcopy(GRAPH)
    place = graph
    for step in path[:-1]:
        place = place[step]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return graph


@pytest.mark.parametrize(
    "graph, said",
    [
        (broken(["version"], 2), r"causal_graph.version is 2: .* reads 1"),
        (broken(["version"], True), "version is True"),
        (broken(["edges"], None), "has no 'edges'"),
        (broken(["colour"], "red"), "unknown key 'colour'"),
        (broken(["nodes", 1, "spam"], 1), r"nodes\[1\]: unknown key 'spam'"),
        (broken(["nodes"], {}), "nodes is {}: it must be a list"),
        (broken(["nodes", 0], "q0"), r"nodes\[0\] is 'q0': it must be an object"),
        (broken(["nodes", 0, "kind"], "guess"), r"nodes\[0\].kind is 'guess': kinds: given"),
        (broken(["nodes", 0, "value"], 48), r"nodes\[0\].value is 48: it must be a string"),
        (broken(["nodes", 1, "id"], "q0"), "the id 'q0' is given twice"),
        (broken(["nodes", 1, "spans"], []), r"nodes\[1\].spans is empty"),
        (broken(["nodes", 1, "spans", 0], ["response", 20]), r"nodes\[1\].spans\[0\] is \['response', 20\]"),
        (broken(["nodes", 1, "spans", 0], ["response", 20, 22.0]), "spans"),
        (broken(["nodes", 1, "spans", 0], ["answer", 20, 22]), "no field 'answer': fields .* prompt, response"),
        (broken(["nodes", 1, "spans", 1], ["response", 53, 530]), r"spans\[1\]: characters 53 to 530 .* which has 103"),
        (broken(["nodes", 1, "spans", 0], ["response", -2, 22]), "characters -2 to 22"),
        (broken(["nodes", 1, "spans", 0], ["response", 22, 22]), "characters 22 to 22"),
        (broken(["nodes", 1, "spans", 1], ["response", 21, 25]), r"\['response', 20, 22\] and .* overlap"),
        (
            broken(["nodes", 2, "spans", 0], ["response", 54, 60]),
            r"edges\[2\]: 'e0' and 'e1' share .*'response', 54, 55",
        ),
        (broken(["edges", 1, "from"], "q9"), r"edges\[1\].from: no node 'q9'"),
        (broken(["edges", 1, "to"], None), r"edges\[1\] has no 'to'"),
        (broken(["edges", 1, "to"], "e0"), r"edges\[1\]: 'q0' -> 'e0' is given twice"),
        (broken(["edges", 1, "weight"], -1), r"edges\[1\].weight is -1"),
        (broken(["edges", 1, "weight"], float("nan")), r"edges\[1\].weight is nan"),
        (broken(["edges", 1, "kind"], "magic"), r"edges\[1\].kind is 'magic'"),
        (broken(["edges", 1, "ambiguous"], 1), r"edges\[1\].ambiguous is 1: it must be true or false"),
        ([], "it must be an object"),
    ],
)
def test_a_graph_that_does_not_hold_is_refused_with_the_place(graph, said):
    with pytest.raises(DataError, match=said):
        read_graph(graph, FIELDS)


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=20))
@settings(max_examples=200, deadline=None)
def test_a_cycle_is_found_exactly_where_there_is_one(pairs):
    cycle = find_cycle([Edge(str(a), str(b)) for a, b in pairs])
    reach = {(a, b) for a, b in pairs}
    for middle in range(8):
        reach |= {(a, c) for a in range(8) for c in range(8) if (a, middle) in reach and (middle, c) in reach}
    assert bool(cycle) == any((a, a) in reach for a in range(8))
    steps = list(zip(cycle, cycle[1:], strict=False))
    assert all((int(a), int(b)) in pairs for a, b in steps) and (not cycle or cycle[0] == cycle[-1])


@pytest.mark.parametrize(
    "expression, value",
    [("48/2", 24), ("5 x 4", 20), ("2*(3+4)", 14), ("-3+5", 2), ("1,200 ÷ 4", 300), (".5*10", 5), ("7-2-1", 4)]
    + [("12/5", Fraction(12, 5)), ("20%*50", 10), ("560//10", 56), ("+10", 10), ("8/(2*2)", 2)],
)
def test_arithmetic_is_exact(expression, value):
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["1/0", "2+", "(3", "3)", "x", "2**3", "2 3", "", "__import__('os')", "(" * 5000, "9" * 5000, "1+" * 900],
)
def test_what_is_no_arithmetic_has_no_value(expression):
    assert evaluate(expression) is None


def test_numbers_are_found_where_they_stand():
    text = "In 1,234 days, $5.50 or .5, 1,2 and 20%: no1 3rd"
    values = {text[n.start : n.end]: str(n.value) for n in numerals(text)}
    assert values == {"1,234": "1234", "5.50": "11/2", ".5": "1/2", "1": "1", "2": "2", "20": "20", "3": "3"}
    assert [n.value for n in number_words("Half of twenty-five, twice; a Dozen, not thirds")] == [
        Fraction(1, 2), 20, 5, 2, 12,
    ]  # fmt: skip
    assert len(NUMBER_WORDS) == 34
    assert [written(Fraction(x)) for x in ("24", "0.2", "1/3", "-3", "2.5")] == ["24", "0.2", "1/3", "-3", "2.5"]


def test_the_latest_earlier_result_comes_first_then_the_question():
    """5 is in the question and twice a result: the latest result is meant, and the edge is ambiguous."""
    extraction = gsm8k("<<2+3=5>>5, <<4+1=5>>5, <<5*6=30>>30", "There are 5 of 6, two, 3 and 4")
    assert links(extraction) == [
        ("w0", "e0", False), ("q2", "e0", False), ("q3", "e1", False), ("e1", "e2", True), ("q1", "e2", False),
    ]  # fmt: skip
    strict = gsm8k("<<2+3=5>>5, <<4+1=5>>5, <<5*6=30>>30", "There are 5 of 6, two, 3 and 4", strict=True)
    assert ("e1", "e2", True) not in links(strict) and len(links(strict)) == 4


def test_an_operand_nobody_named_is_unresolved_and_a_known_constant_is_not():
    extraction = gsm8k("<<8*52=416>>416 and <<8*17=136>>136", "8 weeks")
    assert extraction.counts["operands: constants"] == 1 and extraction.counts["operands: unresolved"] == 1
    assert extraction.counts["examples resolved"] == 0


def test_an_operand_used_twice_is_one_edge_and_both_its_mentions_are_the_result_s():
    extraction = gsm8k("3+4=<<3+4=7>>7. 7+7=<<7+7=14>>14.\n#### 14", "3 and 4")
    assert links(extraction) == [("q0", "e0", False), ("q1", "e0", False), ("e0", "e1", False), ("e1", "f", False)]
    assert [span[1:] for span in extraction.graph.node("e0").spans] == [(4, 5), (7, 8), (9, 10)]


def test_a_number_of_an_earlier_line_is_no_mention():
    extraction = gsm8k("3+4=<<3+4=7>>7 <<7+3=10>>10 and 7 again", "3 and 4")
    assert [span[1:] for span in extraction.graph.node("e0").spans] == [(4, 5)]


def test_the_answer_copies_the_last_result_that_equals_it():
    extraction = gsm8k("<<3+4=7>>7 <<7-3=4>>4 <<4+3=7>>7 <<7*3=21>>21\n#### 7", "3 and 4")
    assert links(extraction)[-1] == ("e2", "f", False)
    assert extraction.counts["answer is an earlier result"] == 1
    assert links(gsm8k("<<3+4=7>>7\n#### -7", "3 and 4"))[-1][1] == "e0"
    assert "examples with an answer" not in gsm8k("<<3+4=7>>7\n#### seven", "3 and 4").counts


def test_the_number_behind_an_annotation_may_have_a_currency_and_a_sign():
    extraction = gsm8k("5-8 = -$<<5-8=-3>>3, <<3*2=6>>six", "5, 8 and 3")
    assert extraction.graph.node("e0").spans == (("response", 8, 9),)
    assert extraction.counts["results not written"] == 1


def test_free_text_gives_the_edges_of_its_annotations():
    plain, _ = without_annotations(NATALIA["answer"])
    extraction = EXTRACTORS["rule:arith"]().extract({"prompt": NATALIA["question"], "response": plain})
    assert {**extraction.graph.to_json(), "source": "rule:gsm8k"} == GRAPH


@pytest.mark.parametrize(
    "response, results",
    [
        ("5 x 4 = $20 and $20 / 2 = $10.", ["20", "10"]),
        ("50% * $10 = $5", ["5"]),
        ("(3 + 4) * 2 = 14", ["14"]),
        ("4 * 30 + 10 = 120 + 10 = 130", ["130"]),
        ("X*3/4 = 6, W/2 - 2 = 55, 2 + 2 = 5, 2/3 = 4/6", []),
        ("26=5+3x", []),
        ("3 - 5 = -2", ["-2"]),
        ("1+" * 5000, []),
    ],
)
def test_equations_in_free_text(response, results):
    prompt = "2 3 4 5 10 20 30 120"
    extraction = EXTRACTORS["rule:arith"]().extract({"prompt": prompt, "response": response})
    nodes = (
        []
        if extraction.graph is None
        else [node.value for node in extraction.graph.nodes if node.kind == "intermediate"]
    )
    assert nodes == results


def teacher(
    important, prompt: str = "Tom has 4 red pens and 48 blue pens.", response: str = "4 + 48 = 52 pens", **knobs
):
    record = {"prompt": prompt, "response": response, "important": important}
    return EXTRACTORS["json:teacher"](**knobs).extract(record)


def test_a_teacher_s_phrases_are_looked_up_in_both_texts():
    extraction = teacher([{"52": ["4", "48", "green"]}])
    spans = {node.value: [tuple(span) for span in node.spans] for node in extraction.graph.nodes}
    assert spans == {
        "4": [("prompt", 8, 9), ("response", 0, 1)],
        "48": [("prompt", 23, 25), ("response", 4, 6)],
        "52": [("response", 9, 11)],
    }
    assert links(extraction) == [("c0", "c1", True), ("c2", "c1", True)]
    assert extraction.counts["phrases not found"] == 1 and extraction.counts["links without a place"] == 1
    assert links(teacher({"52": ["4", "48"]})) == links(extraction)
    assert teacher([{"52": ["4", "48"]}], strict=True).graph is None


def test_a_cause_may_stand_after_its_effect():
    extraction = teacher({"Tom": ["52"]})
    assert links(extraction) == [("c0", "c1", False)]


@pytest.mark.parametrize(
    "important, kind",
    [
        ({"52": ["48"], "48": ["52"]}, "graphs with a circle"),
        ({"blue pens": ["pens"]}, "links between overlapping phrases"),
        ({"52": ["52"]}, "links between overlapping phrases"),
        ({"52": [""]}, "phrases not found"),
    ],
)
def test_a_teacher_s_nonsense_gives_no_graph_and_is_counted(important, kind):
    extraction = teacher(important)
    assert extraction.graph is None and extraction.counts[kind] == 1


@pytest.mark.parametrize("important", ["52", [["52"]], {"52": "48"}, {"52": [48]}])
def test_a_teacher_s_record_of_another_shape_is_refused(important):
    with pytest.raises(DataError, match="important"):
        teacher(important)


def test_a_number_is_not_found_inside_a_longer_one():
    places = [(span.start, span.end) for span in occurrences("prompt", "4 48 84 1,4 4.5 4. 4", "4")]
    assert places == [(0, 1), (16, 17), (19, 20)]
    assert len(occurrences("prompt", "aaaa", "aa")) == 2


def test_overlapping_characters_make_the_tokens_and_every_token_points_to_every_token():
    graph = read_graph(GRAPH, FIELDS)
    text = f"Q: {FIELDS['prompt']}\nA: {RESPONSE}"
    begin = len(text) - len(RESPONSE)
    places = {"prompt": (3, 3 + len(FIELDS["prompt"])), "response": (begin, len(text))}
    tokenizer = load_tokenizer(folder("ar"))
    encoded = tokenizer(text, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    pairs = token_pairs(graph, offsets, places)
    said = {(text[slice(*offsets[e])], text[slice(*offsets[c])]) for e, c, _ in pairs}
    linked = (("24", "48"), ("72", "48"), ("72", "24"), ("72", "72"))
    assert said == {(e, c) for effect, cause in linked for e in effect for c in cause}
    # Digits stand alone in this tokenizer: 2x2 (q0 e0, at both places of e0) twice, 2x2, 2x4, 2x2.
    assert len(pairs) == 4 * 2 + 4 + 8 + 4 and all(weight == 1.0 for *_, weight in pairs)


def test_one_token_may_hold_a_whole_number_and_more():
    graph = read_graph(GRAPH, FIELDS)
    offsets = [(0, 0), (0, 30), (30, 160), (160, 200), (200, 300)]
    assert token_pairs(graph, offsets, {"prompt": (0, 155), "response": (160, 263)}) == [
        (3, 1, 1.0), (4, 1, 1.0), (4, 3, 1.0),
    ]  # fmt: skip


def test_weights_travel_and_ambiguous_edges_may_be_left_out():
    graph = copy.deepcopy(GRAPH)
    graph["edges"][0] |= {"weight": 0.5, "ambiguous": True}
    graph = read_graph(graph, FIELDS)
    offsets = [(i, i + 1) for i in range(300)]
    places = {"prompt": (0, 155), "response": (160, 263)}
    every, sure = token_pairs(graph, offsets, places), token_pairs(graph, offsets, places, keep_ambiguous=False)
    assert {weight for *_, weight in every} == {0.5, 1.0} and {weight for *_, weight in sure} == {1.0}
    assert len(every) - len(sure) == 8


def test_a_text_shorter_than_the_graph_s_is_an_error():
    with pytest.raises(DataError, match="which has 100 as rendered: .* extract it again"):
        token_pairs(read_graph(GRAPH, FIELDS), [(0, 300)], {"prompt": (0, 155), "response": (155, 255)})


def test_truncated_and_packed_examples_keep_the_pairs_whose_tokens_are_both_there():
    pairs = [TokenPair(9, 2, 1.0), TokenPair(9, 5, 0.5), TokenPair(12, 9, 1.0)]
    assert placed(pairs, 0, 12) == [(9, 2, 1.0), (9, 5, 0.5)]
    assert placed(pairs, 4, 20, at=100) == [(105, 101, 0.5), (108, 105, 1.0)]
    assert placed(pairs, 0, 9) == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_extractor_makes_graphs_that_hold(case):
    extractor = build("extractor", EXTRACTORS, case)
    record = {**NATALIA, extractor.field: {"72": ["24"]}} if case["name"] == "json:teacher" else NATALIA
    extraction = extractor.extract(record)
    fields = {"prompt": extraction.prompt, "response": extraction.response}
    assert extraction.graph is None or read_graph(extraction.graph.to_json(), fields) == extraction.graph
    assert extraction.counts["examples"] == 1
    nothing = extractor.extract({"prompt": "Hello", "response": "Hello yourself"})
    assert nothing.graph is None and nothing.response == "Hello yourself"


@pytest.mark.parametrize("case", CASES, ids=str)
@given(text=st.text("0123456789.,+-*/x=()<># $%\n ab", max_size=60))
@settings(max_examples=60, deadline=None)
def test_no_text_breaks_an_extractor(case, text):
    extractor = build("extractor", EXTRACTORS, case)
    extraction = extractor.extract(
        {"prompt": text[:20], "response": text[20:], "important": {text[:2]: [text[1:3], text[9:]]}}
    )
    fields = {"prompt": extraction.prompt, "response": extraction.response}
    assert extraction.graph is None or read_graph(extraction.graph.to_json(), fields) == extraction.graph


def test_every_extractor_has_a_case_and_a_misspelt_one_is_refused():
    assert {case["name"] for case in CASES} == set(EXTRACTORS)
    with pytest.raises(UnknownChoice, match="did you mean 'rule:gsm8k'"):
        build("extractor", EXTRACTORS, {"name": "rule:gsm"})
    with pytest.raises(ConfigError, match="unknown key 'strikt', did you mean 'strict'"):
        build("extractor", EXTRACTORS, {"name": "rule:gsm8k", "strikt": True})
    with pytest.raises(DataError, match="'answer' is no string"):
        EXTRACTORS["rule:gsm8k"]().extract({"question": "?", "answer": None})
    with pytest.raises(DataError, match="no texts"):
        EXTRACTORS["rule:gsm8k"]().extract({"text": "?"})


def test_a_file_of_examples_becomes_a_file_of_graphs(tmp_path: Path):
    source = tmp_path / "small" / "train.jsonl"
    source.parent.mkdir()
    lines = [
        json.dumps(NATALIA),
        "{broken",
        json.dumps({"question": 3, "answer": ""}),
        json.dumps({**NATALIA, "id": 7}),
    ]
    source.write_text("\n".join(lines), encoding="utf-8")
    statistics = write_graphs(str(source), EXTRACTORS["rule:gsm8k"](), tmp_path / "out")
    written_lines = [json.loads(line) for line in (tmp_path / "out" / GRAPHS).read_text().splitlines()]
    assert [line["id"] for line in written_lines] == ["small-train-0", "7"]
    assert written_lines[0] == {"id": "small-train-0", **FIELDS, "causal_graph": GRAPH}
    assert statistics["examples"] == 2 and statistics["counts"]["records refused"] == 2
    assert ("edges", 8, "4.00 per graph") in table(statistics["counts"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["graphs.jsonl", "statistics.json"]
    assert find_example(tmp_path / "out" / GRAPHS, "7").graph.to_json() == GRAPH
    assert find_example(tmp_path / "out" / GRAPHS, None).id == "small-train-0"
    with pytest.raises(DataError, match="no example with id 'x'"):
        find_example(tmp_path / "out" / GRAPHS, "x")
    beside = write_graphs(str(source), EXTRACTORS["rule:gsm8k"](), tmp_path / "here.jsonl")
    assert Path(beside["file"]) == tmp_path / "here.jsonl" and (tmp_path / "here.statistics.json").is_file()


def test_a_file_without_examples_is_an_error_and_leaves_what_was_there(tmp_path: Path):
    (tmp_path / "graphs.jsonl").write_text("old", encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text('{"text": "no example"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="1 an example has no texts"):
        write_graphs(str(tmp_path / "bad.jsonl"), EXTRACTORS["rule:gsm8k"](), tmp_path)
    assert (tmp_path / "graphs.jsonl").read_text() == "old"


MEASURED = {  # per cent, of what `statistics.ROWS` says; the reference extraction of GSM8K's training problems
    "operands: results": 34.9,
    "operands: question numerals": 48.4,
    "operands: number words": 6.7,
    "operands: constants": 5.0,
    "operands: unresolved": 5.1,
    "examples resolved": 72.0,
    "numerals of that value: one": 73.7,
    "numerals of that value: several": 9.6,
    "numerals of that value: none": 16.7,
    "answer is the last result": 93.7,
    "answer is an earlier result": 0.2,
}


def test_gsm8k_s_training_problems_have_the_statistics_of_the_reference(real_data, tmp_path: Path):
    train = real_data / "gsm8k" / "train.jsonl"
    if not train.is_file():
        pytest.skip(f"no GSM8K at {train}")
    measured = write_graphs(str(train), EXTRACTORS["rule:gsm8k"](), tmp_path)["counts"]
    assert (measured["examples"], measured["annotations"], measured["equations"]) == (7473, 23716, 23716)
    assert measured["examples"] - measured["examples with equations"] == 95
    assert measured["operands"] == 50911
    wholes = dict(ROWS)
    for name, share in MEASURED.items():
        assert 100 * measured[name] / measured[wholes[name]] == pytest.approx(share, abs=1.0), name


def an_example(graph=GRAPH) -> GraphExample:
    return read_example({"id": "gsm8k-train-0", **FIELDS, "causal_graph": graph}, "here")


def test_the_marked_text_is_the_text_with_brackets():
    assert "".join(piece.text for piece in marked(an_example(), "response")) == (
        "Natalia sold 48/2 = [24]e0 clips in May.\n"
        "Natalia sold 48+[24]e0 = [72]e1 clips altogether in April and May.\n#### [72]f"
    )
    overlapping = copy.deepcopy(GRAPH)
    overlapping["nodes"].append({"id": "c", "kind": "concept", "value": "", "spans": [["prompt", 21, 27]]})
    assert " to[ 48 of]c her" in "".join(piece.text for piece in marked(an_example(overlapping), "prompt"))
    assert marked(an_example(None), "prompt") == [Piece(FIELDS["prompt"])]


def test_where_the_cause_of_a_pair_is_seen():
    pairs = [TokenPair(9, 1, 1.0), TokenPair(9, 8, 1.0), TokenPair(2, 9, 1.0), TokenPair(3, 2, 1.0)]
    assert list(pair_places(pairs, 4).values()) == [1, 2, 1]
    assert list(pair_places(pairs, 16).values()) == [0, 4, 0]


def test_a_picture_s_lines_hold_every_letter_once():
    text = "word " * 60 + "\n\n" + "x" * 200 + "\nend"
    lines = list(wrapped(text))
    assert all(end - start <= COLUMNS for start, end in lines)
    covered = sorted(index for start, end in lines for index in range(start, end))
    assert covered == [index for index, letter in enumerate(text) if letter != "\n"]
    sheet = Sheet.of({"prompt": text, "response": "end"})
    number, low, high = next(sheet.pieces("response", 1, 3))
    assert (low, high) == (1, 3) and sheet.lines[number].field == "response"
    assert len(list(sheet.pieces("prompt", 0, len(text)))) == len(lines) - 1  # the empty line holds no letter


def test_explain_graph_says_and_draws_an_example(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    file, picture = tmp_path / "graphs.jsonl", tmp_path / "deep" / "graph.png"
    file.write_text(json.dumps({"id": "a", **FIELDS, "causal_graph": GRAPH}) + "\n", encoding="utf-8")
    assert main(["explain-graph", str(file), "--tokenizer", "tiny", "--png", str(picture), "--block-size", "8"]) == 0
    said = capsys.readouterr().out
    assert "a: 4 nodes and 4 edges, made by rule:gsm8k" in said and "\x1b" not in said
    assert "= [24]e0 clips" in said and "e1  intermediate  72  <- q0, e0\n" in said and "<- e1 (copy)" in said
    assert "24 token pairs in 142 tokens; at block size 8 the cause is" in said
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000


def test_explain_graph_shows_an_example_without_a_graph(tmp_path: Path, capsys):
    file = tmp_path / "graphs.jsonl"
    file.write_text(json.dumps({"id": "a", **FIELDS, "causal_graph": None}) + "\n", encoding="utf-8")
    assert main(["explain-graph", str(file), "--id", "a", "--png", str(tmp_path / "x.png")]) == 0
    assert "a: no graph" in capsys.readouterr().out and (tmp_path / "x.png").is_file()


@pytest.mark.parametrize(
    "line, flags, said",
    [
        (json.dumps({**FIELDS, "causal_graph": broken(["version"], 3)}), [], "record 1: causal_graph.version is 3"),
        (json.dumps({**FIELDS, "causal_graph": None}), [], "no example with a graph"),
        ("{", [], "broken JSON"),
        (json.dumps({"prompt": "x", "causal_graph": {}}), [], 'it needs "prompt" and "response"'),
        (json.dumps({**FIELDS, "causal_graph": GRAPH}), ["--block-size", "0"], "--block-size 0"),
        (json.dumps({**FIELDS, "causal_graph": GRAPH}), ["--tokenizer", "nobody"], "nobody"),
    ],
)
def test_explain_graph_refuses_what_it_cannot_show(tmp_path: Path, capsys, line, flags, said):
    file = tmp_path / "graphs.jsonl"
    file.write_text(line + "\n", encoding="utf-8")
    assert main(["explain-graph", str(file), *flags]) == 2
    assert said in capsys.readouterr().err


def test_prepare_writes_graphs_and_prints_what_it_met(tmp_path: Path, capsys):
    (tmp_path / "train.jsonl").write_text(json.dumps(NATALIA) + "\n{\n", encoding="utf-8")
    flags = ["--graphs", "rule:gsm8k", "--path", str(tmp_path / "train.jsonl"), "--out", str(tmp_path / "out")]
    assert main(["prepare", *flags, "--set", "graphs.strict=true"]) == 0
    said = capsys.readouterr().out
    assert "operands: question numerals                2  50.0 % of operands" in said
    assert "refused: train.jsonl record 2: broken JSON" in said and "graphs.jsonl: 1 examples" in said


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--graphs", "rule:gsm"], "--graphs needs --path and --out"),
        (["--graphs", "rule:gsm", "--path", "x", "--out", "y"], "did you mean 'rule:gsm8k'"),
        (["--graphs", "rule:arith", "--path", "x", "--out", "y", "--set", "graphs.strct=1"], "did you mean 'strict'"),
        (["--graphs", "rule:arith", "--path", "/nope/x", "--out", "y"], "no such file"),
        (["--graphs", "rule:arith", "--path", "none.jsonl", "--out", "y"], "no example could be read"),
        (["--graphs", "rule:arith", "--path", "x", "--out", "y", "--tokenizer", "tiny"], "--tokenizer"),
    ],
)
def test_prepare_refuses_graphs_it_cannot_make_and_leaves_nothing(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    Path("none.jsonl").write_text('{"a": 1}\n')
    assert main(["prepare", *flags]) == 2
    assert said in capsys.readouterr().err and os.listdir() == ["none.jsonl"]


def test_the_graphs_of_made_up_sums_are_exact():
    """Every span holds its value, every result follows from its two causes, the last one is the answer."""
    for example, _ in Arithmetic(count=60, steps=3, largest=20, seed=2).examples(Report()):
        graph = read_graph(example.graph, {"prompt": example.prompt, "response": example.response})
        texts = {"prompt": example.prompt, "response": example.response}
        assert all(texts[s.field][s.start : s.end] == node.value for node in graph.nodes for s in node.spans)
        causes = {node.id: [e.cause for e in graph.edges if e.effect == node.id] for node in graph.nodes}
        lines = example.response.split("\n")
        for step in range(3):
            first, second = causes[f"e{step}"]
            assert (first, second) == (f"e{step - 1}" if step else "q0", f"q{step + 1}")
            written = [graph.node(name).value for name in (first, second, f"e{step}")]
            assert re.split("[-+=]", lines[step]) == written
        assert causes["f"] == ["e2"] and not any(causes[f"q{i}"] for i in range(4))


def test_the_rule_finds_no_edge_that_the_exact_graph_lacks():
    for example, _ in Arithmetic(count=60, steps=2, largest=20, seed=2).examples(Report()):
        record = {"prompt": example.prompt, "response": example.response}
        found = EXTRACTORS["rule:arith"](strict=True).extract(record)
        exact = read_graph(example.graph, record)
        results = {node.spans[0].start: node.id for node in exact.nodes if node.kind == "intermediate"}
        for edge in found.graph.edges if found.graph is not None else ():
            cause, effect = found.graph.node(edge.cause), found.graph.node(edge.effect)
            if effect.kind == "intermediate" and cause.kind == "given":
                causes = [e.cause for e in exact.edges if e.effect == results[effect.spans[0].start]]
                assert cause.value in [exact.node(name).value for name in causes]
