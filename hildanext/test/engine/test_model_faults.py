"""A model that gives no numbers, and a parent of other words: what the engine, the service and the verbs make of it."""

from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import random_model
from hildanext.api import create_app
from hildanext.ar import Parent, sample_documents
from hildanext.core.errors import LogitsNotFinite, ModelError
from hildanext.core.runtime import RuntimeConfig
from hildanext.data.batch import Batch
from hildanext.decoding import ThresholdEdit
from hildanext.engine.base import Failed, Finished, Request, complete, stream
from hildanext.engine.local import LocalEngine, LocalEngineConfig
from hildanext.inference import GenerationConfig, generate
from hildanext.likelihood.conditional import Pair, score_diffusion, score_parent
from hildanext.likelihood.held_out import exact, parent_likelihood
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.loading.loaded_model import LoadedModel
from hildanext.models.sampling import NO_TOKEN, next_tokens
from hildanext.serve.settings import ServeConfig
from serving import ask, events
from small_models import parent_of, small_causal, small_parent, words_tokenizer

PROMPT = Request(prompt="w3 w4 w5", max_new_tokens=9)


def broken(model: DiffusionModel, value: float = float("nan")) -> DiffusionModel:
    with torch.no_grad():
        model.causal_lm.model.norm.weight[3] = value
    return model


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    engine = LocalEngine(random_model(), words_tokenizer(), parent_of(random_model(seed=1)))
    yield engine
    engine.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("who", ["diffusion model", "autoregressive parent"])
def test_a_request_fails_with_the_name_of_the_model_and_the_engine_lives(engine: LocalEngine, who: str, value: float):
    request = Request(**{**vars(PROMPT), "parent": who != "diffusion model"})
    sound = complete(engine, request).tokens
    weights = engine.model if who == "diffusion model" else engine.parent
    before = weights.causal_lm.model.norm.weight.detach().clone()
    broken(weights, value)
    last = list(stream(engine, request))[-1]
    assert isinstance(last, Failed) and isinstance(last.error, LogitsNotFinite)
    assert f"the logits of the {who} are NaN or infinite" in str(last.error)
    with torch.no_grad():
        weights.causal_lm.model.norm.weight.copy_(before)
    assert engine.load().alive and complete(engine, request).tokens == sound


def test_only_the_rows_that_have_no_logits_fail():
    model = random_model()
    with torch.no_grad():  # whoever reads the word w7 has no numbers
        model.causal_lm.model.embed_tokens.weight[7] = float("nan")
    model.causal_lm.lm_head.weight = torch.nn.Parameter(random_model().head.detach().clone())
    engine = LocalEngine(model, words_tokenizer(), None, LocalEngineConfig(slots=4))
    sound, sick = Request(tokens=(3, 4, 5), max_new_tokens=40), Request(tokens=(3, 7, 5), max_new_tokens=40)
    alone = complete(engine, sound)
    seen: dict[int, list[object]] = {number: [] for number in range(4)}
    for number, request in enumerate((sound, sick, sound, sick)):
        engine.submit(request, seen[number].append)
    engine.close(drain_seconds=60.0)
    ends = [seen[number][-1] for number in range(4)]
    assert [type(end) for end in ends] == [Finished, Failed, Finished, Failed]
    assert ends[0].answer.tokens == ends[2].answer.tokens == alone.tokens


def test_the_service_answers_500_and_a_stream_ends_with_an_error_event(engine: LocalEngine):
    app = create_app(ServeConfig(), engine, None)
    broken(engine.model)
    whole = ask(app, "POST", "/v1/completions", json={"model": engine.facts.model, "prompt": "w3 w4", "max_tokens": 5})
    assert whole.status_code == 500 and whole.json()["error"]["code"] == "logits_not_finite"
    assert "the logits of the diffusion model are NaN" in whole.json()["error"]["message"]
    told = ask(app, "POST", "/generate/stream", json={"prompt": "w3 w4", "max_new_tokens": 5})
    name, data = events(told.text)[-1]
    assert name == "error" and "the logits of the diffusion model are NaN" in data["error"]["message"]


@pytest.mark.parametrize("alignment", ["block", "parent"])
@pytest.mark.parametrize("decoder", [ThresholdEdit(), ThresholdEdit(temperature=0.7, top_k=5, tau_edit=None)])
def test_a_generation_raises_at_the_first_step(alignment: str, decoder: ThresholdEdit):
    model = broken(random_model(alignment=alignment))
    with pytest.raises(LogitsNotFinite, match="diffusion model"):
        generate(model, None, [[1, 2, 3], [4]], decoder, GenerationConfig(max_new_tokens=8))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_parent_raises_at_the_first_token(temperature: float):
    parent = parent_of(broken(random_model()))
    with pytest.raises(LogitsNotFinite, match="autoregressive parent"):
        parent.generate_batch([[1, 2], [3]], 4, temperature)
    with pytest.raises(LogitsNotFinite):
        list(sample_documents(parent, 2, 4, temperature=temperature))


def test_a_row_without_logits_has_no_token_and_leaves_the_others_theirs():
    logits = torch.randn(4, 9)
    logits[0, 3], logits[1, 8], logits[2, 4] = float("nan"), float("inf"), float("-inf")
    for temperature in (0.0, 0.8):
        tokens = next_tokens(logits, torch.rand(4, dtype=torch.float64), temperature).tolist()
        assert tokens[:2] == [NO_TOKEN, NO_TOKEN] and tokens[2] != 4 and min(tokens[2:]) >= 0


def test_likelihoods_raise_instead_of_being_no_numbers():
    model = broken(random_model())
    tokens = torch.arange(1, 9)[None]
    position, document = torch.arange(8)[None], torch.zeros(1, 8, dtype=torch.long)
    batch = Batch(tokens=tokens, document=document, position=position, maskable=torch.ones(1, 8, dtype=torch.bool))
    pair = Pair((1, 2), (3, 4))
    for score in (
        lambda: exact(model, [batch], 0),
        lambda: parent_likelihood(parent_of(model), [batch], 0),
        lambda: score_diffusion(model, [pair]),
        lambda: score_parent(parent_of(model), [pair]),
    ):
        with pytest.raises(LogitsNotFinite):
            score()


def test_a_parent_of_other_words_is_asked_in_its_own():
    """Ids are turned round: what the model calls w1 the parent calls w58."""
    core = Tokenizer(models.WordLevel({f"w{60 - i}": i for i in range(61)}, unk_token="w2"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    own = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="w0", eos_token="w1", unk_token="w2")
    own.chat_template = "{% for m in messages %}w9 {{ m.content }} {% endfor %}"
    parent = Parent(small_causal(rows=64), own)
    engine = LocalEngine(random_model(), words_tokenizer(), parent)
    request = Request(prompt="w3 w4 w5", max_new_tokens=6, parent=True, ignore_eos=True)
    want = parent.generate(own("w0 w3 w4 w5", add_special_tokens=False)["input_ids"], 6, stop_ids=[])
    got = complete(engine, request)
    assert got.tokens == want.tokens and got.text == want.text
    engine.close()


def test_a_parent_of_the_same_words_has_the_model_s_tokenizer_and_template(engine: LocalEngine):
    assert engine.parent_tokenizer is engine.tokenizer and engine.parent.tokenizer is not engine.tokenizer


def test_an_evaluation_refuses_a_parent_of_other_words(tmp_path):
    opened = LoadedModel.open_or_convert(str(small_parent(tmp_path / "a")), RuntimeConfig(device="cpu"), "parent", 4)
    with pytest.raises(ModelError, match="has other tokens"):
        opened.parent(str(small_parent(tmp_path / "b", length=61)))
