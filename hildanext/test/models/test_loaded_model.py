"""A model is opened in one way: threads, device, dtype, card, and its parent under the same vocabulary."""

import pytest
import torch

from hildanext.ar import Parent
from hildanext.core.errors import CheckpointError, ConfigError, ModelError, UnknownChoice
from hildanext.core.runtime import RuntimeConfig
from hildanext.models.loading.loaded_model import LoadedModel
from hildanext.models.loading.tiny import folder

FP64 = RuntimeConfig("cpu", "fp64", 1)


def test_what_is_opened_says_what_it_runs_on():
    opened = LoadedModel.open("tiny", FP64)
    assert opened.model.dtype == torch.float64 and not opened.model.training and not opened.untrained
    block = opened.card.block_size
    assert opened.summary() == {
        "model": "tiny", "dtype": "float64", "device": "cpu", "threads": 1, "block_size": block,
    }  # fmt: skip
    machine = opened.machine()
    assert (machine["device"], machine["dtype"], machine["threads"]) == ("cpu", "float64", 1)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (RuntimeConfig("quantum"), ConfigError),
        (RuntimeConfig("cpu", "fp8"), UnknownChoice),
        (RuntimeConfig("cpu", "fp32", 0), ConfigError),
    ],
)
def test_what_a_machine_has_not_is_an_error_before_any_weight_is_read(config, error, tmp_path):
    with pytest.raises(error):
        LoadedModel.open(str(tmp_path / "nowhere"), config)


def test_its_parent_never_gives_the_mask_or_an_unused_row_any_probability():
    opened = LoadedModel.open("tiny", FP64)
    assert opened.parent_name == opened.card.parent == "tiny"
    parent = Parent(*opened.parent())
    logits = parent.logits(torch.zeros(1, opened.model.causal_lm.config.hidden_size, dtype=torch.float64))
    assert torch.equal(logits[0].isneginf(), opened.model.banned) and opened.model.banned[opened.card.mask_id]


def test_a_parent_of_another_vocabulary_is_refused(make_model, tmp_path):
    opened = LoadedModel.open("tiny", FP64)
    other = LoadedModel("other", make_model(), opened.tokenizer, opened.runtime)
    with pytest.raises(ModelError, match="rows, the checkpoint"):
        other.parent("tiny")


def test_an_autoregressive_model_is_opened_for_measuring_only_where_that_is_asked_for():
    parent = str(folder("ar"))
    with pytest.raises(CheckpointError, match=r"hilda\.json"):
        LoadedModel.open(parent, FP64)
    opened = LoadedModel.open_or_convert(parent, FP64, "parent", 4)
    assert opened.untrained and opened.parent_name == parent and opened.card.block_size == 4
    assert not LoadedModel.open_or_convert("tiny", FP64, "parent", 4).untrained
