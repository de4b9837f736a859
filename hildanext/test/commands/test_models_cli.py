"""hildanext models: what is here, what each is, and that nothing but what was pulled can be deleted."""

import io
import json
import os
from pathlib import Path

import pytest

from hildanext.cli import main
from hildanext.models.checkpoint import save_diffusion
from hildanext.models.loading.names import locate_diffusion
from hildanext.models.start import start_conversion
from small_models import small_parent


class Typed(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return small_parent(tmp_path_factory.mktemp("parent"))


@pytest.fixture
def home(tmp_path, monkeypatch, parent):
    """A models folder with a parent, a diffusion model, a pull that broke off and a link to a folder elsewhere."""
    monkeypatch.setenv("HILDANEXT_HOME", str(tmp_path / "home"))
    root = tmp_path / "home" / "models"
    for name in ("smollm2-135m", "owner--name"):
        (root / name).mkdir(parents=True)
        for file in Path(parent).iterdir():
            (root / name / file.name).write_bytes(file.read_bytes())
    save_diffusion(root / "owner--blocks", *start_conversion(parent, "parent", 4))
    for name in ("owner--name.partial", "qwen3-0.6b.partial"):
        (root / name).mkdir()
        (root / name / "config.json").write_text("{")
    return root


def models(capsys, *words):
    code = main(["models", *words])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_the_list_has_what_is_embedded_what_was_pulled_and_what_could_be(home, capsys):
    code, out, _ = models(capsys, "list", "--json")
    told = json.loads(out)
    assert code == 0 and told["folder"] == str(home)
    kinds = [(row["name"], row["kind"], row["pulled"]) for row in told["models"]]
    assert kinds == [
        ("tiny", "autoregressive", False),
        ("tiny", "diffusion", False),
        ("owner/blocks", "diffusion", True),
        ("owner/name", "autoregressive", True),
        ("owner/name", "unfinished", True),
        ("qwen3-0.6b", "unfinished", True),
        ("smollm2-135m", "autoregressive", True),
    ]
    sizes = {row["folder"]: row["bytes"] for row in told["models"]}
    assert sizes[str(home / "qwen3-0.6b.partial")] == 1
    assert sizes[str(home / "owner--name")] == sum(file.stat().st_size for file in (home / "owner--name").iterdir())
    assert {row["name"]: row["licence"] for row in told["models"]}["smollm2-135m"] == "Apache-2.0"
    assert [row["name"] for row in told["could_be_pulled"]] == ["qwen3-0.6b", "qwen3-1.7b"]
    lines = models(capsys, "list")[1].splitlines()
    assert any("owner/name" in line and str(home / "owner--name") in line for line in lines)
    assert any("qwen3-1.7b" in line and "hildanext pull qwen3-1.7b" in line for line in lines)


def test_a_models_folder_that_is_not_there_holds_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HILDANEXT_HOME", str(tmp_path / "none"))
    code, out, _ = models(capsys, "list", "--json")
    assert code == 0 and {row["name"] for row in json.loads(out)["models"]} == {"tiny"}
    assert not (tmp_path / "none").exists()


def test_show_tells_sizes_card_and_files(home, capsys):
    (facts,) = json.loads(models(capsys, "show", "owner/blocks", "--json")[1])["models"]
    assert facts["kind"] == "diffusion" and facts["card"]["block_size"] == 4 and facts["layers"] == 2
    assert {"model.safetensors", "hilda.json"} <= {file["name"] for file in facts["files"]}
    code, out, _ = models(capsys, "show", "owner/blocks")
    assert code == 0 and "block_size 4" in out and "hilda.json" in out
    assert models(capsys, "show", "tiny")[1].count("parameters") == 2
    assert models(capsys, "show", "qwen3-0.6b")[1].count("unfinished") == 1
    assert models(capsys, "show", str(home / "owner--blocks"))[0] == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qwen3-1.7b", "hildanext pull qwen3-1.7b fetches it"),
        ("owner/nam", "did you mean 'owner/name'"),
        ("", "unknown pulled model"),
        ("../elsewhere", {"show": "has no config.json", "remove": "unknown pulled model"}),
        (".", {"show": "has no config.json", "remove": "unknown pulled model"}),
    ],
)
@pytest.mark.parametrize("action", ["show", "remove"])
def test_a_name_that_is_no_model_here_is_one_line(action, name, words, home, tmp_path, capsys, monkeypatch):
    (tmp_path / "home" / "elsewhere").mkdir()
    monkeypatch.chdir(home.parent / "elsewhere")
    words = words if isinstance(words, str) else words[action]
    code, _, err = models(capsys, action, name, *(["--yes"] if action == "remove" else []))
    assert code == 2 and words in err and err.count("\n") == 1
    assert (home.parent / "elsewhere").is_dir() and len(list(home.iterdir())) == 5


def test_remove_deletes_a_model_and_what_an_unfinished_pull_of_it_left(home, capsys):
    code, out, _ = models(capsys, "remove", "owner/name", "--yes")
    assert code == 0 and str(home / "owner--name.partial") in out and out.endswith("deleted\n")
    assert sorted(path.name for path in home.iterdir()) == ["owner--blocks", "qwen3-0.6b.partial", "smollm2-135m"]


@pytest.mark.parametrize(
    ("said", "code", "left"), [("y\n", 0, False), ("\n", 1, True), ("no\n", 1, True), ("", 1, True)]
)
def test_it_asks_at_a_terminal(said, code, left, home, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", Typed(said))
    assert models(capsys, "remove", "smollm2-135m")[0] == code
    assert (home / "smollm2-135m").is_dir() is left


def test_where_nobody_can_be_asked_it_wants_yes(home, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    code, _, err = models(capsys, "remove", "smollm2-135m")
    assert code == 2 and "--yes" in err and (home / "smollm2-135m").is_dir()


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_what_links_lead_to_stays(home, tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.json").write_text("{}")
    (home / "linked").symlink_to(elsewhere, target_is_directory=True)
    (home / "owner--blocks" / "inside").symlink_to(elsewhere, target_is_directory=True)
    for name in ("linked", "owner/blocks"):
        assert models(capsys, "remove", name, "--yes")[0] == 0
    assert (elsewhere / "config.json").is_file()
    assert not (home / "linked").is_symlink() and not (home / "owner--blocks").exists()


def test_the_embedded_model_stays(home, capsys):
    code, _, err = models(capsys, "remove", "tiny", "--yes")
    assert code == 2 and "part of the package" in err


def test_a_diffusion_model_that_was_pulled_is_found_by_its_name(home):
    assert locate_diffusion("owner/blocks") == home / "owner--blocks"
