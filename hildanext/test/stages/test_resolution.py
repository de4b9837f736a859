"""A verb is a recipe of one stage: the same names, the same keys of the run, the same checks through every door."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hildanext.cli import main
from hildanext.core import plots
from hildanext.core.errors import ConfigError, HildaError
from hildanext.recipe import StageContext, execute, open_stage, read_stage
from hildanext.stages import STAGES
from training_fixtures import small_checkpoint

CONFIGS = sorted((Path(__file__).parents[2] / "runs" / "configs").rglob("*.json"))
VERBS = ("convert", "sft", "prepare", "generate", "eval", "bench")
ONE_STEP = {"wsd": [{"phase": "decay", "block_size": 8, "tokens": 64}], "valid_rows": 2}
CHAT = {"train": {"name": "arithmetic", "count": 40, "steps": 1}, "valid_share": 0.2, "sequence_length": 96}


STORIES = ("Once upon a time there was a dog.", "The sun was hot and Tom was sad.", "Lily had a red ball. She ran.")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Prepared data, a checkpoint, and a run with a section for every verb."""
    folder = tmp_path_factory.mktemp("place")
    model = str(small_checkpoint(folder / "model"))
    for part, stories in (("train", STORIES[1:]), ("valid", STORIES[:2])):
        text = folder / f"{part}.txt"
        text.write_text("\n<|endoftext|>\n".join(stories))
        assert main(["prepare", "--source", "tinystories", "--path", str(text), "--out", str(folder / part)]) == 0
    data = {part: str(folder / part) for part in ("train", "valid")}
    run: dict[str, Any] = {
        "parent": "tiny",
        "data": {**data, "sequence_length": 32, "pad_to_block": 8},
        "convert": {"block_size": 8, **ONE_STEP, "train": {"batch_size": 2}},
        "chat": CHAT,
        "sft": {
            "model": model, "epochs": 0.05, "valid_rows": 2, "samples": {"count": 0}, "train": {"batch_size": 2},
        },
        "prepare": {"source": {"name": "parent", "documents": 3, "max_tokens": 12}},
        "generate": {"model": model, "prompts": ["Once"], "max_new_tokens": 8, "decoder": {"temperature": 2.0}},
        "eval": {
            "model": model, "parent": "", "data": data["valid"], "sequence_length": 32, "pad_to_block": 8,
            "rows": 1, "likelihood": {"block_sizes": [8], "draws": 2}, "generation": None,
        },
        "bench": {"model": model, "parent": "", "prompt_tokens": 4, "new_tokens": 8, "repeats": 1},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(run))
    return folder


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They cost more than the steps."""
    monkeypatch.setattr("hildanext.trainer.run.training_plots", lambda metrics, folder: [])
    # The name in that module alone: a verb that is imported meanwhile would keep a replaced `plots.save` for good.
    monkeypatch.setattr("hildanext.eval.evaluation.plots", SimpleNamespace(**{**vars(plots), "save": _unsaved}))


def _unsaved(figure: object, path: Path) -> Path:
    return path


def call(place: Path, verb: str, out: Path | None, *assignments: str, without: str = "") -> int:
    """Run a verb on the run, without one of its sections or keys."""
    run = json.loads((place / "run.json").read_text())
    run.pop(without, None)
    path = place / f"without-{without}.json"
    path.write_text(json.dumps(run))
    words = [verb, "decode"] if verb == "bench" else [verb]
    words += ["--config", str(path), *(word for assignment in assignments for word in ("--set", assignment))]
    words += ["--json"] if verb in ("generate", "convert", "sft") else []
    words += [] if verb == "generate" else ["--quiet"] if verb != "bench" else []
    if out is not None and verb not in ("generate", "bench"):
        words += ["--out", str(out)]
    return main(words)


def result(place: Path, verb: str, out: Path, capsys: pytest.CaptureFixture[str], *assignments: str) -> str:
    """What a verb made, without what varies from run to run."""
    capsys.readouterr()
    assert call(place, verb, out, *assignments) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    if verb == "generate":
        return str(json.loads(printed)["tokens"])
    if verb == "bench":
        return str(json.loads(printed.splitlines()[-1])["settings"]["seed"])
    if verb == "eval":
        return str(json.loads((out / "eval.json").read_text())["likelihood"])
    suffix = "*.u32" if verb == "prepare" else "checkpoint/*.safetensors"
    return "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(out.glob(suffix)))


OWN_SEED = {
    "convert": "convert.seed=7",
    "sft": "sft.seed=7",
    "prepare": "prepare.source.seed=7",
    "generate": "generate.seed=7",
    "eval": "eval.likelihood.seed=7",
    "bench": "bench.seed=7",
}


@pytest.mark.parametrize("verb", VERBS)
def test_the_run_s_seed_decides_what_a_verb_makes_and_a_section_s_own_wins(verb, place, tmp_path, capsys):
    none = result(place, verb, tmp_path / "none", capsys)
    seven = result(place, verb, tmp_path / "seven", capsys, "seed=7")
    own = result(place, verb, tmp_path / "own", capsys, "seed=1", OWN_SEED[verb])
    assert none and none != seven == own


@pytest.mark.parametrize("verb", VERBS)
def test_a_device_that_is_not_there_is_an_error(verb, place, tmp_path, capsys):
    assert call(place, verb, tmp_path / "out", "device=cuda:9") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "device 'cuda:9' is not there" in error


@pytest.mark.parametrize("verb", VERBS)
def test_a_number_of_threads_is_set(verb, place, tmp_path, capsys, monkeypatch):
    counts: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    assert call(place, verb, tmp_path / "out", "threads=3") == 0, capsys.readouterr().err
    assert counts and set(counts) == {3}


def test_a_dtype_is_what_is_computed_in(place, tmp_path, capsys):
    assert call(place, "generate", None, "dtype=fp64") == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "float64"
    assert call(place, "bench", None, "dtype=fp64") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["machine"]["dtype"] == "float64"
    assert call(place, "eval", tmp_path / "eval", "dtype=fp64") == 0
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["machine"]["dtype"] == "float64"
    samples = [result(place, "prepare", tmp_path / dtype, capsys, f"dtype={dtype}") for dtype in ("fp32", "fp64")]
    assert all(samples)  # of the same draws, which need not differ


@pytest.mark.parametrize("verb", ["convert", "sft"])
def test_a_dtype_is_a_training_s_precision(verb, place, tmp_path, capsys):
    assert call(place, verb, tmp_path, "dtype=fp32") == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["config"][verb]["train"]["precision"] == "no"


def no_number(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


@pytest.mark.parametrize(
    "verb, same, documents, count",
    [("convert", "name=x", 2, 1), ("sft", f"chat.valid={json.dumps(CHAT['train'])}", 40, 40), ("sft", "name=x", 11, 0)],
)
def test_what_is_held_out_and_trained_on_is_said_and_one_batch_has_no_error(
    verb, same, documents, count, place, tmp_path, capsys, caplog
):
    """The held-out stories are one that is trained on and one that is not."""
    assert call(place, verb, tmp_path, same) == 0
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["held_out"]["trained_on"] == count and record["held_out"]["documents"] == documents
    assert (f"{count} of {documents} held-out documents are trained on" in caplog.text) == bool(count)
    summary = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=no_number)
    last = summary["last"]
    assert last["bound"] > 0 and last["bound_se"] is None


@pytest.mark.parametrize("dtype, precision", [("fp32", "no"), ("bf16", "bf16"), ("auto", "auto")])
def test_a_section_s_precision_wins_over_the_dtype(dtype, precision):
    context = StageContext(Path(), "convert", dtype=dtype, seed=3, device="cpu")
    assert context.training({})["train"] == {"precision": precision}
    own = context.training({"train": {"precision": "auto", "clip": 2}, "seed": 4})
    assert own == {"train": {"precision": "auto", "clip": 2}, "seed": 4, "device": "cpu"}


@pytest.mark.parametrize("verb", ["convert", "sft"])
@pytest.mark.parametrize("dtype, word", [("fp16", "loss scaler"), ("fp64", "'auto', 'no' or 'bf16'")])
def test_a_dtype_that_no_training_has_is_refused(verb, dtype, word, place, tmp_path, capsys):
    assert call(place, verb, tmp_path / "out", f"dtype={dtype}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and word in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["convert", "prepare", "eval", "bench"])
def test_the_run_s_parent_is_taken(verb, place, tmp_path, capsys):
    """Each asks for it, and says that it is not there."""
    run = json.loads((place / "run.json").read_text())
    del run["bench"]["parent"], run["eval"]["parent"]
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run))
    words = [verb, "decode"] if verb == "bench" else [verb, "--out", str(tmp_path / "out")]
    assert main([*words, "--config", str(path), "--set", f"parent={place / 'no-such-parent'}"]) == 2
    assert "no-such-parent" in capsys.readouterr().err


def test_a_run_that_names_no_parent_converts_the_embedded_one_and_asks_the_card_otherwise():
    _, context = open_stage({"convert": ONE_STEP, "data": {"train": "a", "valid": "b"}}, "convert", STAGES)
    assert context.start == "tiny" and context.parent is None


MISSPELT = [
    ("seeed=1", "unknown key 'seeed', did you mean 'seed'?"),
    ("covert.x=1", "unknown key 'covert', did you mean 'convert'?"),
    ("evall.x=1", "unknown key 'evall', did you mean 'eval'?"),
    ("profile=SAFFE", "profile"),
    ("dtypes=fp32", "unknown key 'dtypes', did you mean 'dtype'?"),
    ("thread=2", "unknown key 'thread', did you mean 'threads'?"),
]


@pytest.mark.parametrize("assignment, word", MISSPELT)
@pytest.mark.parametrize(
    "words",
    [
        *(["bench", "decode"] if verb == "bench" else [verb] for verb in VERBS),
        ["sft", "--data-only"],
        ["bench", "serve"],
        ["serve"],
        ["generate", "--server", "http://127.0.0.1:9"],
        ["prepare", "--graphs", "rule:gsm8k", "--path", "x"],
        ["chat"],
        ["chat", "--server", "http://127.0.0.1:9"],
        ["plan"],
        ["check"],
        ["jobs", "submit", "convert"],
    ],
    ids=" ".join,
)
def test_a_name_that_no_run_has_is_refused_at_every_door(words, assignment, word, place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = {**json.loads((place / "run.json").read_text()), "serve": {"model": "tiny"}}
    Path("run.json").write_text(json.dumps(run))
    out = ["--out", "out"] if words[0] in ("convert", "sft", "prepare") else []
    assert main([*words, "--config", "run.json", "--set", assignment, *out]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and word in error
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "verb, assignment, word",
    [
        ("convert", "convert.blocksize=8", "did you mean 'block_size'"),
        ("convert", "data.pad_to_blok=8", "did you mean 'pad_to_block'"),
        ("sft", "sft.epoch=2", "did you mean 'epochs'"),
        ("sft", "chat.valid_shares=0.1", "did you mean 'valid_share'"),
        ("prepare", "prepare.shard_token=8", "did you mean 'shard_tokens'"),
        ("prepare", "prepare.source.document=8", "did you mean 'documents'"),
        ("generate", "generate.mode=S_MODE", "did you mean 'modes'"),
        ("generate", "decoder.tau_maks=0.5", "did you mean 'tau_mask'"),
        ("generate", "generation.max_new_token=5", "did you mean 'max_new_tokens'"),
        ("eval", "eval.row=2", "did you mean 'rows'"),
        ("eval", "eval.quality={}", "tasks"),
        ("eval", "eval.harness.task=[]", "did you mean 'tasks'"),
        ("bench", "bench.repeat=2", "did you mean 'repeats'"),
        ("bench", "bench.decode.repeat=2", "did you mean 'repeats'"),
    ],
)
def test_a_key_that_a_section_does_not_have_is_refused(verb, assignment, word, place, tmp_path, capsys):
    assert call(place, verb, tmp_path / "out", assignment) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and word in error


NEEDED = {
    "data": {"train": "a", "valid": "b"},
    "sft": {"model": "tiny"},
    "rl": {"model": "tiny"},
    "eval": {"model": "tiny", "data": "a"},
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_of_the_repository_does_for_its_verbs(path):
    run = json.loads(path.read_text(encoding="utf-8"))
    verbs = [verb for verb in (*VERBS, "rl") if verb in run]
    assert verbs
    stages = [stage["stage"] for stage in run.get("stages", ())]
    for verb in verbs:
        if stages.count(verb) > 1:  # such a run is a whole
            continue
        needed = {name: {**section, **run.get(name, {})} for name, section in NEEDED.items() if name in (verb, "data")}
        if verb in needed and "parent" in run[verb]:  # a start of its own
            needed[verb].pop("model", None)
        section, context = open_stage({**run, **needed}, verb, STAGES)
        assert section and context.seed == run.get("seed", 0) and context.parent == run.get("parent")


def test_no_config_of_the_repository_holds_out_what_it_trains_on():
    for path in CONFIGS:
        prepared = json.loads(path.read_text(encoding="utf-8")).get("prepare", {})
        if not {"train", "valid"} <= set(prepared):
            continue
        train, valid = (prepared[part]["source"] for part in ("train", "valid"))
        same = {key: train.get(key) == valid.get(key) for key in train.keys() | valid.keys()}
        if train["name"] == "parent":
            assert not same["seed"], path.name
            continue
        (split, rows), (held, held_rows) = (source["split"].rstrip("]").split("[") for source in (train, valid))
        assert split != held or int(rows.split(":")[0]) >= int(held_rows.split(":")[1]), path.name


def test_a_verb_takes_its_entry_of_a_recipe_and_what_earlier_stages_left(place, tmp_path):
    run = json.loads((place / "run.json").read_text())
    run |= {"folder": str(tmp_path), "stages": [{"stage": "prepare"}, {"stage": "convert", "block_size": 4}]}
    run["prepare"] = {part: run["prepare"] for part in ("train", "valid")}
    del run["data"]["train"], run["data"]["valid"]
    with pytest.raises(ConfigError, match="stage 'convert' needs 'train'"):
        open_stage(run, "convert", STAGES)
    execute({**run, "stages": run["stages"][:1]}, STAGES)
    section, context = open_stage(run, "convert", STAGES, out=tmp_path / "mine")
    assert section["block_size"] == 4 and context.stage_dir == tmp_path / "mine"
    assert context.outcome("train") == str(tmp_path / "prepare" / "train")
    (tmp_path / "recipe.json").write_text(json.dumps(run))
    words = ["--config", str(tmp_path / "recipe.json"), "--out", str(tmp_path / "mine"), "--quiet"]
    assert main(["convert", *words]) == 0
    record = json.loads((tmp_path / "mine" / "run.json").read_text())
    assert record["config"]["convert"]["parent"] == run["parent"]
    assert record["config"]["data"]["train"] == str(tmp_path / "prepare" / "train")


def test_an_entry_that_could_be_several_is_asked_for():
    run = {"stages": [{"stage": "bench", "as": "a", "what": "train"}, {"stage": "bench", "as": "b"}]}
    with pytest.raises(ConfigError, match="several stages 'bench': a, b"):
        read_stage(run, "bench", STAGES)
    run["stages"][1].pop("as")
    assert read_stage(run, "bench", STAGES)[1].section == {}


def test_a_recipe_and_a_verb_make_the_same_bits(place, tmp_path, capsys):
    run = {**json.loads((place / "run.json").read_text()), "seed": 5, "folder": str(tmp_path / "run")}
    outcomes = execute({**run, "stages": [{"stage": "convert"}, {"stage": "sft"}]}, STAGES)
    for verb in ("convert", "sft"):
        made = result(place, verb, tmp_path / verb, capsys, "seed=5")
        files = sorted((Path(outcomes[verb]["model"])).glob("*.safetensors"))
        assert made == "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files) != ""


@pytest.mark.parametrize("verb", ["convert", "sft"])
def test_a_verb_that_was_told_to_stop_says_how_to_go_on_and_a_recipe_fails(verb, place, tmp_path, capsys):
    stop = [f"{verb}.train.stop_after=1", f"{verb}.train.batch_size=1"]
    stop += ["sft.epochs=0.5"] if verb == "sft" else []
    assert call(place, verb, tmp_path / "verb", *stop) == 0
    told = capsys.readouterr()
    assert "the same command without it goes on" in told.err
    assert json.loads(told.out.splitlines()[-1])["whole"] is False
    run = {**json.loads((place / "run.json").read_text()), "folder": str(tmp_path / "run"), "stages": [{"stage": verb}]}
    run[verb] = {**run[verb], "train": {"stop_after": 1, "batch_size": 1}, **({"epochs": 0.5} if verb == "sft" else {})}
    with pytest.raises(HildaError, match=f"{verb} stopped before its end: run again without train.stop_after"):
        execute(run, STAGES)


def test_a_section_inside_a_stage_s_own_lies_over_the_run_s():
    run = {"data": {"train": "a", "valid": "b", "sequence_length": 64}, "convert": {**ONE_STEP, "data": {"train": "c"}}}
    section, _ = open_stage(run, "convert", STAGES)
    assert section["data"] == {"train": "c", "valid": "b", "sequence_length": 64}


def test_parts_drawn_from_the_parent_without_a_seed_are_different_draws(place, tmp_path, capsys):
    source = json.dumps({"name": "parent", "documents": 3, "max_tokens": 12})
    sets = [f"prepare.{part}.source={source}" for part in ("train", "valid")]
    assert call(place, "prepare", tmp_path, *sets, without="prepare") == 0, capsys.readouterr().err
    train, valid = (next((tmp_path / part).glob("*.tokens.u32")).read_bytes() for part in ("train", "valid"))
    assert train != valid
    assert call(place, "prepare", tmp_path / "x", *sets, "prepare.out=one", without="prepare") == 2
    assert "both parts go to" in capsys.readouterr().err


def test_several_modes_and_prompts_of_a_run_are_all_answered(place, capsys):
    modes = ['generate.modes=["S_MODE","Q_MODE"]', 'generate.prompts=["Once","The"]']
    assert call(place, "generate", None, *modes) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["prompt"], row["mode"].split()[0]) for row in rows] == [
        (prompt, mode) for mode in ("S_MODE", "Q_MODE") for prompt in ("Once", "The")
    ]
    config = str(place / "without-.json")
    assert main(["generate", "--config", config, "--set", modes[0], "--trace", "x.json"]) == 2
    assert "choose one with --mode" in capsys.readouterr().err


def test_flags_win_over_the_section_and_the_run(place, capsys):
    config = ["generate", "--config", str(place / "run.json"), "--json", "--set", "dtype=fp64", "--set", "seed=3"]
    assert main([*config, "--set", "generate.seed=4", "--seed", "5", "--dtype", "fp32", "--max-new-tokens", "4"]) == 0
    flagged = json.loads(capsys.readouterr().out)
    assert flagged["dtype"] == "float32" and flagged["stats"]["tokens"] <= 4
    assert main([*config, "--set", "generate.seed=5", "--dtype", "fp32", "--max-new-tokens", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == flagged["tokens"]


@pytest.mark.parametrize("flags", [["--limit", "3"], ["--batch-size", "2"], ["--mode", "Q_MODE"]])
def test_flags_of_tasks_without_tasks_are_refused(flags, place, capsys):
    assert main(["eval", "--config", str(place / "run.json"), *flags]) == 2
    assert f"{flags[0]} is about benchmark tasks" in capsys.readouterr().err
