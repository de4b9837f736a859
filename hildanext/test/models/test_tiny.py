"""The embedded pair: small, readable under every version, and telling a story."""

import importlib.util
from pathlib import Path

import pytest
import torch

from hildanext.ar import Parent, sample_documents
from hildanext.core.errors import ModelError
from hildanext.decoding.exact.policy import ExactConfig
from hildanext.exact import generate_exact
from hildanext.inference import GenerationConfig
from hildanext.models.draft_checkpoint import load_drafts
from hildanext.models.loading import tiny
from hildanext.models.loading.load import load_diffusion, load_parent
from hildanext.models.start import start_conversion
from hildanext.tokenization import real_ids

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_tiny.py"
BEGINNING = "Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine."


@pytest.fixture(scope="module")
def parent() -> Parent:
    return Parent(*load_parent("tiny"))


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_tiny", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["train_tiny"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_pair_is_at_most_ten_megabytes():
    folder = tiny.folder("ar").parent
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 10_000_000


def test_the_parent_has_between_two_and_four_million_weights(parent):
    assert 2e6 <= sum(weight.numel() for weight in parent.causal_lm.parameters()) <= 4e6
    assert type(parent.causal_lm).__name__ == "Qwen3ForCausalLM"


def test_greedy_tells_a_story_of_three_sentences(parent):
    prompt = "Once upon a time"
    result = parent.generate(parent.tokenizer(prompt)["input_ids"], 80)
    story = prompt + parent.tokenizer.decode(result.tokens)
    assert story.startswith(BEGINNING)
    assert story.count(".") >= 3 and story.isascii()


def test_any_text_survives_the_tokenizer(parent):
    for text in ('Once upon a time, 42 cats.\n\n  "Hi!"', "naïve — 你好 \U0001f600", "", " "):
        assert parent.tokenizer.decode(parent.tokenizer(text)["input_ids"]) == text


def test_the_tokenizer_adds_nothing_and_begins_texts_as_it_ends_them(parent):
    tokenizer = parent.tokenizer
    assert tokenizer("Once")["input_ids"] == tokenizer.convert_tokens_to_ids(tokenizer.tokenize("Once"))
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert tokenizer.mask_token_id is None


def test_a_row_is_free_for_the_mask():
    model, tokenizer = start_conversion("tiny", "parent", 32)
    assert (model.card.mask_id, model.card.vocab_rows, model.card.vocab_real) == (2047, 2048, 2047)
    assert model.card.parent == "tiny"
    assert int(real_ids(model.card, tokenizer).sum()) == 2046


def test_its_documents_are_stories(parent):
    documents = list(sample_documents(parent, 16, 64, seed=0))
    assert all(0 < len(document) <= 64 for document in documents)
    assert torch.tensor(sorted({token for document in documents for token in document})).max() < 2047


def test_the_diffusion_half_belongs_to_the_parent(parent):
    try:
        folder = tiny.folder("diffusion")
    except ModelError:
        pytest.skip("the converted half is not in this checkout")
    model, tokenizer = load_diffusion("tiny")
    assert folder.name == "diffusion" and model.card.parent == "tiny"
    assert model.card.vocab_rows == parent.head.shape[0] and tokenizer.mask_token_id == model.card.mask_id
    text = "Once upon a time, there was a little girl"
    assert tokenizer(text)["input_ids"] == parent.tokenizer(text)["input_ids"]


def test_its_adapters_draft_about_two_tokens_a_forward_of_the_parent_s_own_text():
    folder = tiny.folder("drafts")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 1_000_000
    drafter, tokenizer, card = load_drafts("tiny")
    assert (card.parent, card.places) == ("tiny", 4) and card.acceptance[0] > 0.7
    beginnings = ("Once upon a time, there was a", "One day, a little boy named Tom went", "The cat wanted to")
    prompts = [tokenizer(text)["input_ids"] for text in beginnings]
    settings = GenerationConfig(max_new_tokens=48)
    plain, drafted = (
        generate_exact(drafter, tokenizer, prompts, config, settings)
        for config in (ExactConfig(drafter="none"), ExactConfig(after="all"))
    )
    assert [result.tokens for result in drafted] == [result.tokens for result in plain]
    tokens = sum(len(result.tokens) for result in drafted)
    forwards = sum(result.stats.denoise_forwards for result in drafted)
    assert tokens / forwards > 1.9


def test_an_installation_without_the_pair_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(tiny, "files", lambda package: tmp_path)
    with pytest.raises(ModelError, match="not in this installation"):
        load_parent("tiny")


def test_the_script_trains_resumes_and_installs(script, tmp_path, monkeypatch, capsys):
    """Twelve steps at once and six and six give the same weights."""
    data = tmp_path / "stories.txt"
    lines = [f"Tim had {count} red balls. He ran and ran and saw a dog." for count in range(60)]
    data.write_text("\n<|endoftext|>\n".join(lines))
    small = '"vocab_rows": 320, "hidden": 32, "layers": 1, "inner": 32, "heads": 2, "kv_heads": 1, "head_dim": 16'
    fixed = f'{small}, "batch": 2, "length": 32'

    def train(work: str, tokens: int) -> Path:
        arguments = ["ar", "--data", str(data), "--work", str(tmp_path / work), "--fp32"]
        recipe = "{" + f'{fixed}, "tokens": {tokens}' + "}"
        monkeypatch.setattr("sys.argv", ["train_tiny.py", *arguments, "--recipe", recipe])
        script.main()
        return tmp_path / work

    whole = train("whole", 12 * 64)

    class Killed(RuntimeError):
        pass

    with monkeypatch.context() as patch:
        patch.setattr(script.time, "perf_counter", iter(range(0, 100_000, 61)).__next__)  # save after every step
        step, count = script.Optimiser.step, []

        def six(optimiser, share: float) -> None:
            if len(count) == 6:
                raise Killed
            count.append(share)
            step(optimiser, share)

        patch.setattr(script.Optimiser, "step", six)
        with pytest.raises(Killed):
            train("broken", 12 * 64)
    broken = train("broken", 12 * 64)
    states = [load_parent(folder / "ar")[0].state_dict() for folder in (whole, broken)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    monkeypatch.setattr(script, "ASSETS", tmp_path / "assets")
    monkeypatch.setattr("sys.argv", ["train_tiny.py", "install-ar", "--work", str(whole)])
    script.main()
    assert "MB" in capsys.readouterr().out
    assert Parent(*load_parent(tmp_path / "assets" / "ar")).head.shape == (320, 32)
