"""C2DLM: which rows and columns a pair means, re-attention, the losses, gradients, and that off is off."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import random_model
from hildanext import masks
from hildanext.core.errors import ConfigError
from hildanext.core.metrics_log import read_metrics
from hildanext.corruption.input_layout import build_layout, layout_of
from hildanext.corruption.schedules import BlockPhase, LearningRate
from hildanext.diffusion import CausalPairs, NoisedBatch, effect_rates, replace_tokens
from hildanext.losses import SupervisedStep, objective
from hildanext.losses.c2dlm import AttentionToCauses, CausalAttention, _gram, re_attention, row_loss, value_norms
from hildanext.losses.causal_rows import CausalRows, causal_rows
from hildanext.losses.mask_to_token import MaskToToken
from hildanext.losses.objective import attention_for
from hildanext.losses.token_to_token import TokenToToken
from hildanext.models.attention.blockwise import DoubledAttention
from hildanext.models.attention.dense import AttentionContext, MaskedAttention
from hildanext.models.lora import LoraConfig, add_lora
from hildanext.trainer.config import TrainConfig
from hildanext.trainer.task import TrainingTask
from hildanext.training import train
from hildanext.wsd_stage0 import convert
from noised_examples import MASK, make_view

NO_SPECIALS = torch.zeros(64, dtype=torch.bool)


def paired(view: NoisedBatch, *pairs: tuple[int, int], masked=(), replaced=(), weights=None) -> NoisedBatch:
    """The view with these (effect, cause) pairs in its first row, and exactly these tokens masked or wrong."""
    weights = weights if weights is not None else [1.0] * len(pairs)
    rows = [[(effect, cause, weight) for (effect, cause), weight in zip(pairs, weights, strict=True)]]
    hidden, wrong = (
        torch.zeros_like(view.masked).index_fill(1, torch.tensor(x).long(), True) for x in (masked, replaced)
    )
    hidden, wrong = hidden & (torch.arange(len(hidden)) == 0)[:, None], wrong & (torch.arange(len(wrong)) == 0)[:, None]
    noisy = view.clean.masked_fill(hidden, MASK)
    noisy = torch.where(wrong, (view.clean + 1) % MASK, noisy)
    return replace(view, noisy=noisy, masked=hidden, replaced=wrong, pairs=CausalPairs.collate(rows))


def rows_of(
    view: NoisedBatch, shift="none", clean_mask="block_causal", special=NO_SPECIALS, most=64
) -> CausalRows | None:
    fed = build_layout(view, layout_of(view.block_size, view.clean.shape[1], shift))
    generator = torch.Generator().manual_seed(0)
    return causal_rows(view, fed, shift, clean_mask, view.masked | view.replaced, special, most, generator)


def columns(rows: CausalRows, number: int = 0) -> tuple[int, list[int], list[int]]:
    """Query, causal columns and other columns of a row of the first sequence."""
    causal, others = rows.causal[0, number].nonzero()[:, 0], rows.others[0, number].nonzero()[:, 0]
    return int(rows.index[0, number]), causal.tolist(), others.tolist()


def test_a_cause_in_an_earlier_block_is_the_clean_copy():
    view = paired(make_view(length=8, batch=1), (6, 1), masked=[6])
    assert columns(rows_of(view)) == (6, [9], [4, 5, 7, 8, 10, 11])


def test_a_cause_in_the_same_block_is_the_noisy_copy():
    view = paired(make_view(length=8, batch=1), (6, 5), masked=[6])
    assert columns(rows_of(view)) == (6, [5], [4, 7, 8, 9, 10, 11])


def test_a_cause_in_a_later_block_is_dropped():
    view = paired(make_view(length=8, batch=1), (1, 6), masked=[1])
    assert rows_of(view) is None


def test_one_block_over_the_whole_row_sees_every_cause():
    view = paired(make_view(length=8, batch=1, block=8), (1, 6), masked=[1])
    assert columns(rows_of(view)) == (1, [6], [0, 2, 3, 4, 5, 7])


def test_under_the_left_shift_the_row_is_where_the_prediction_is_read():
    """Inside a block that is the noisy token before; at its start the clean one, which sees clean tokens alone."""
    inside = paired(make_view(length=8, batch=1), (6, 1), masked=[6])
    assert columns(rows_of(inside, "left", "token_causal")) == (5, [9], [4, 7, 8, 10, 11])
    first = paired(make_view(length=8, batch=1), (4, 1), masked=[4])
    assert columns(rows_of(first, "left", "token_causal")) == (11, [9], [8, 10])


def test_at_block_size_one_under_the_left_shift_there_is_only_the_clean_copy():
    view = paired(make_view(length=8, batch=1, block=1, t=1.0), (6, 1), masked=[6])
    assert columns(rows_of(view, "left", "token_causal")) == (5, [1], [0, 2, 3, 4])


def test_special_tokens_and_masks_are_no_other_columns():
    view = paired(make_view(length=8, batch=1), (6, 1), masked=[5, 6])
    special = NO_SPECIALS.clone()
    special[[MASK, int(view.clean[0, 2])]] = True
    same = (view.clean[0, :4] == view.clean[0, 2]).nonzero()[:, 0]
    _, causal, others = columns(rows_of(view, special=special))
    assert causal == [9] and 5 not in others
    assert not set(others) & {8 + int(i) for i in same}


def test_a_cause_stays_a_column_even_when_it_is_masked_or_special():
    view = paired(make_view(length=8, batch=1), (6, 5), masked=[5, 6])
    special = NO_SPECIALS.clone()
    special[MASK] = True
    assert columns(rows_of(view, special=special))[1] == [5]


def test_another_document_is_no_cause():
    view = make_view(length=16, batch=1, documents=[0] * 8 + [1] * 8)
    assert rows_of(paired(view, (14, 1), masked=[14])) is None
    assert columns(rows_of(paired(view, (14, 9), masked=[14])))[1] == [16 + 9]


def test_weights_of_the_causes_add_up_to_one():
    view = paired(make_view(length=8, batch=1), (6, 1), (6, 5), masked=[6], weights=[1.0, 3.0])
    rows = rows_of(view)
    assert rows.causal[0, 0, [9, 5]].tolist() == [0.25, 0.75]
    assert rows.others[0, 0].sum() == pytest.approx(1.0)


def test_a_row_that_sees_nothing_but_causes_is_left_out():
    view = make_view(length=4, batch=1, block=4)
    view = paired(view, (3, 0), (3, 1), (3, 2), masked=[3])
    assert rows_of(view) is None


def test_rows_are_drawn_where_there_are_too_many():
    view = make_view(length=32, batch=2, block=8)
    pairs = [[(i, 0, 1.0) for i in range(8, 32)], [(9, 0, 1.0)]]
    view = replace(view, pairs=CausalPairs.collate(pairs), masked=torch.ones_like(view.masked))
    every, few = rows_of(view), rows_of(view, most=5)
    assert every.real.sum(-1).tolist() == [24, 1] and few.real.sum(-1).tolist() == [5, 1]
    assert set(few.index[0].tolist()) < set(every.index[0].tolist())
    assert int(few.index[1, 0]) == 9


WORKED = (torch.tensor([0.5, 0.3, 0.2]), torch.tensor([1.0, 2.0, 4.0]))


def worked(norms: torch.Tensor | None) -> torch.Tensor:
    scores = WORKED[0].double().log().view(1, 1, 1, 1, 3)
    value_norms = None if norms is None else norms.double().view(1, 1, 1, 3)
    return re_attention(scores, torch.zeros(1, 1, 1, 1, 3).double(), value_norms).flatten()


def test_re_attention_as_computed_by_hand():
    assert worked(WORKED[1]).tolist() == pytest.approx([0.26316, 0.31579, 0.42105], abs=1e-5)
    assert worked(None).tolist() == pytest.approx(WORKED[0].tolist())


@pytest.mark.parametrize("norms, ratio", [(WORKED[1], 0.92308), (None, 0.85714)])
def test_the_ratio_of_causes_to_the_rest(norms, ratio):
    attention = worked(norms)
    assert float(attention[1] / attention[[0, 2]].mean()) == pytest.approx(ratio, abs=1e-5)


@pytest.mark.parametrize(
    "kind, value",
    [("log_hinge", 0.77319), ("cat_hinge", 1.07692), ("cat_nll", -0.48), ("cat_div2", -0.21131), ("cat_div", -0.9327)]
    + [("mass", -math.log(0.315789474))],
)
def test_each_kind_of_loss_has_the_value_computed_by_hand(kind, value):
    attention = worked(WORKED[1])
    causes, others = attention[1:2], attention[[0, 2]].mean()[None]
    assert float(row_loss(causes, others, kind, 2.0, 1e-9)) == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("kind", ["log_hinge", "cat_hinge", "cat_nll", "cat_div", "cat_div2"])
def test_a_row_that_looks_enough_at_its_causes_is_content(kind):
    causes = torch.tensor([0.4], requires_grad=True)
    loss = row_loss(causes, torch.tensor([0.1]), kind, 2.0, 1e-6)
    loss.sum().backward()
    assert float(loss.detach()) == 0.0 and float(causes.grad) == 0.0


@pytest.mark.parametrize("kind", ["log_hinge", "cat_hinge", "cat_nll", "cat_div", "cat_div2", "mass"])
def test_rows_without_any_attention_to_one_side_stay_finite(kind):
    for causes, others in ((0.0, 0.5), (0.5, 0.0), (0.0, 0.0)):
        a = torch.tensor([causes], requires_grad=True)
        loss = row_loss(a, torch.tensor([others]), kind, 2.0, 1e-6)
        loss.sum().backward()
        assert math.isfinite(float(loss.detach())) and math.isfinite(float(a.grad))


def whole_map(model, view: NoisedBatch, layer: int, inner: AttentionContext) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax map [batch heads query key] of a layer, and its values, by an attention loss without short cuts."""
    kept = {}
    mask = masks.doubled(view.document, view.position, view.block_size)

    class Look:
        def attend(self, number, query, key, value, scale):
            if number == layer:
                group = query.shape[1] // key.shape[1]
                scores = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * scale
                kept["map"] = scores.masked_fill(~mask[:, None], -math.inf).softmax(-1)
                kept["value"] = value.repeat_interleave(group, 1)
            return inner.attend(number, query, key, value, scale)

    fed = build_layout(view, "double")
    tokens, positions = fed.tokens(view), fed.rows(view).position
    with torch.no_grad():
        model(model.embed(tokens), positions, Look())
    return kept["map"], kept["value"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("reattention", ["none", "v_norm", "v_out_norm"])
@pytest.mark.parametrize("context", [MaskedAttention, DoubledAttention])
def test_the_rows_computed_apart_are_those_of_the_whole_map(family, reattention, context, monkeypatch):
    """The definition, written out over the whole attention map, against what the loss computes."""
    model, layer = random_model(family), 1
    view = paired(make_view(length=16), (9, 2), (9, 8), (14, 4), replaced=[9, 14])
    mask = masks.doubled(view.document, view.position, 4)
    inner = attention_for(view, build_layout(view, "double"), "block_causal", model.head)
    assert isinstance(inner, DoubledAttention)
    if context is MaskedAttention:
        inner = MaskedAttention(mask)
        monkeypatch.setattr(objective, "attention_for", lambda *_: inner)
    attention, value = whole_map(model, view, layer, inner)
    weight = value.norm(dim=-1) if reattention == "v_norm" else torch.ones_like(value[..., 0])
    if reattention == "v_out_norm":
        matrix = model.causal_lm.model.layers[layer].self_attn.o_proj.weight.detach().unflatten(1, (4, 8))
        weight = torch.einsum("mhd,bhjd->bhjm", matrix, value).norm(dim=-1)
    re = attention * weight[:, :, None]
    re = (re / re.sum(-1, keepdim=True)).mean(1)[0]
    expected = []
    for row, causes in ((9, [16 + 2, 8]), (14, [16 + 4])):
        rest = [j for j in mask[0, row].nonzero()[:, 0].tolist() if j not in (*causes, row)]
        ratio = float(re[row, causes].mean()) / float(re[row, rest].mean())
        expected.append(max(0.0, math.log(50.0) - math.log(ratio)))
    knobs = CausalAttention(reattention=reattention, layers=(layer,), lambda_c=1.0, alpha=50.0, eps=1e-12)
    outcome = SupervisedStep(model, {"c2dlm": knobs}, special=NO_SPECIALS, layout="double")(view)
    assert outcome.auxiliary.item() == pytest.approx(sum(expected) / 2, rel=1e-6)
    assert sum(expected) > 0


def test_apply_chooses_which_effects_are_looked_at():
    model = random_model()
    masked = paired(make_view(length=16), (9, 2), masked=[9])
    wrong = paired(make_view(length=16), (9, 2), replaced=[9])
    right = paired(make_view(length=16), (9, 2), masked=[3])
    looked = {
        apply: [
            SupervisedStep(model, {"c2dlm": CausalAttention(apply=apply, loss="mass")})(view).auxiliary is not None
            for view in (masked, wrong, right)
        ]
        for apply in ("off", "m2t", "t2t", "both")
    }
    assert looked == {
        "off": [False, False, False],
        "m2t": [True, False, False],
        "t2t": [False, True, False],
        "both": [True, True, False],
    }


def checkpointed(model) -> None:
    model.recompute_layers()
    model.train()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("grad_through_v", [False, True])
def test_the_gradient_reaches_queries_and_keys_of_the_chosen_layer(checkpointing, grad_through_v):
    """Nothing reaches later layers, nor the values of the layer itself unless asked for."""
    model = random_model()
    add_lora(model, LoraConfig(rank=2, alpha=4))
    model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    if checkpointing:
        checkpointed(model)
    view = paired(make_view(length=16), (9, 2), (14, 4), replaced=[9, 14])
    knobs = CausalAttention(layers=(1,), loss="mass", grad_through_v=grad_through_v)
    outcome = SupervisedStep(model, {"c2dlm": knobs})(view)
    outcome.auxiliary.backward()

    def reached(layer: int, projection: str) -> bool:
        part = f"layers.{layer}.self_attn.{projection}.lora_"
        gradients = [p.grad for name, p in model.named_parameters() if part in name]
        assert len(gradients) == 2
        return any(grad is not None and float(grad.abs().max()) > 0 for grad in gradients)

    assert reached(1, "q_proj") and reached(1, "k_proj") and reached(0, "q_proj")
    assert reached(1, "v_proj") == grad_through_v
    assert not any(reached(2, projection) for projection in ("q_proj", "k_proj", "v_proj"))


def test_gradients_under_checkpointing_are_the_same_and_nothing_is_collected_twice():
    view = paired(make_view(length=16), (9, 2), (14, 4), replaced=[9, 14])
    outcomes = []
    for checkpointing in (False, True):
        model = random_model()
        if checkpointing:
            checkpointed(model)
        losses = {"t2t": TokenToToken(), "c2dlm": CausalAttention(layers="all", lambda_c=3.0)}
        outcome = SupervisedStep(model, losses)(view)
        (outcome.total + outcome.auxiliary).backward()
        outcomes.append((outcome.auxiliary.item(), [p.grad for p in model.parameters()]))
    assert outcomes[0][0] == outcomes[1][0] and outcomes[0][0] > 0
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(outcomes[0][1], outcomes[1][1], strict=True))


def test_a_recomputed_layer_does_not_replace_what_the_first_pass_found():
    model = random_model()
    view = paired(make_view(length=16), (9, 2), replaced=[9])
    rows = rows_of(view)
    attention = attention_for(view, build_layout(view, "double"), "block_causal", model.head)
    attention_loss = AttentionToCauses(attention, CausalAttention(), rows, frozenset({0}), 1.0)
    query, key = torch.randn(2, 4, 32, 8).double(), torch.randn(2, 2, 32, 8).double()
    attention_loss.attend(0, query, key, key, 1.0)
    first = float(attention_loss.loss())
    attention_loss.attend(0, -query, key, key, 1.0)
    assert len(attention_loss.means) == 1 and float(attention_loss.loss()) == first


@pytest.mark.parametrize("alignment", ["block", "parent"])
@pytest.mark.parametrize("off", [{"lambda_c": 0.0}, {"apply": "off"}, {"decay_from": 0.0}, {}])
def test_without_weight_or_without_graphs_nothing_changes(alignment, off):
    """Bit for bit, in loss, gradients and what is left in the generator."""
    view = paired(make_view(length=16), (9, 2), masked=[8], replaced=[9])
    if not off:
        view = replace(view, pairs=None)
    results = []
    for losses in (
        {"t2t": TokenToToken()},
        {"t2t": TokenToToken(), "c2dlm": CausalAttention(**{"apply": "both"} | off)},
    ):
        model = random_model(alignment=alignment)
        generator = torch.Generator().manual_seed(5)
        outcome = SupervisedStep(model, losses)(
            view, mask_noise=0.1, generator=generator, wants_draft=True, progress=1.0 if "decay_from" in off else 0.0
        )
        outcome.total.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((outcome.total.detach(), outcome.draft, generator.get_state(), *gradients))
        assert outcome.auxiliary is None
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_other_losses_do_not_notice_it():
    model = random_model()
    view = paired(make_view(length=16), (9, 2), masked=[8], replaced=[9])
    alone = SupervisedStep(model, {"m2t": MaskToToken()})(view)
    beside = SupervisedStep(model, {"m2t": MaskToToken(), "c2dlm": CausalAttention()})(view)
    assert torch.equal(alone.total, beside.total) and set(beside.losses) == {"m2t"}
    assert beside.averages["c2dlm"].item() == beside.auxiliary.item() > 0


def test_the_weight_falls_over_the_last_half():
    knobs = CausalAttention(lambda_c=0.4)
    assert [knobs.weight_at(p) for p in (0.0, 0.5, 0.75, 1.0)] == pytest.approx([0.4, 0.4, 0.2, 0.0])
    assert CausalAttention(lambda_c=0.4, decay_from=1.0).weight_at(1.0) == 0.4
    view = paired(make_view(length=16), (9, 2), replaced=[9])
    step = SupervisedStep(random_model(), {"c2dlm": CausalAttention(loss="mass")})
    early, late = (step(view, progress=p).auxiliary.item() for p in (0.0, 0.75))
    assert late == pytest.approx(early / 2)


def test_heads_and_layers_can_be_chosen():
    view = paired(make_view(length=16), (9, 2), replaced=[9])
    model = random_model()

    def auxiliary(**knobs) -> float:
        chosen = CausalAttention(lambda_c=1.0, loss="cat_hinge", alpha=1e6, eps=1e-12, **knobs)
        return 1e6 - SupervisedStep(model, {"c2dlm": chosen})(view).auxiliary.item()

    assert auxiliary(layers=(0, 1, 2)) == auxiliary(layers="all") != auxiliary() == auxiliary(layers=(1,))
    assert auxiliary(heads=(0, 1, 2, 3)) == auxiliary() != auxiliary(heads=(2,))


@pytest.mark.parametrize(
    "knobs, said", [({"layers": (3,)}, "layers"), ({"heads": (-1,)}, "heads"), ({"layers": ()}, "layers")]
)
def test_layers_and_heads_that_are_not_there_are_refused(knobs, said):
    with pytest.raises(ConfigError, match=said):
        SupervisedStep(random_model(), {"c2dlm": CausalAttention(**knobs)})


def test_the_norm_behind_the_output_projection_knows_adapters():
    model = random_model("qwen2")
    add_lora(model, LoraConfig(rank=2, alpha=4, dropout=0.5))
    model.double().train()
    view = paired(make_view(length=16), (9, 2), replaced=[9])
    knobs = CausalAttention(reattention="v_out_norm", layers=(1,))

    def auxiliary() -> float:
        torch.manual_seed(0)
        return SupervisedStep(model, {"c2dlm": knobs})(view).auxiliary.item()

    before = auxiliary()
    assert model.causal_lm.model.layers[1].self_attn.o_proj.training
    with torch.no_grad():
        model.causal_lm.model.layers[1].self_attn.o_proj.lora_B["default"].weight.normal_()
    assert auxiliary() != before
    assert torch.equal(_gram(model, 1), _gram(model, 1))  # nothing is dropped in it


def test_value_norms_of_a_projection_that_rotates_are_the_plain_ones():
    value = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0)).double()
    gram = torch.eye(8).double().expand(4, 8, 8)
    plain, behind = value_norms(value, 4, "v_norm"), value_norms(value, 4, "v_out_norm", gram)
    assert plain.shape == (2, 2, 1, 5) and behind.shape == (2, 2, 2, 5)
    assert torch.allclose(plain.expand_as(behind), behind)


def test_effects_are_replaced_more_often_where_asked():
    view = make_view(length=400, batch=4, block=4, t=1e-9)
    pairs = CausalPairs.collate([[(i, 0, 1.0) for i in range(1, 400, 2)]] * 4)
    view = replace(view, pairs=pairs)
    plain = replace_tokens(view, 0.1, torch.arange(MASK), torch.Generator().manual_seed(1))
    same = replace_tokens(view, effect_rates(view, 0.1, 1.0), torch.arange(MASK), torch.Generator().manual_seed(1))
    assert torch.equal(plain.noisy, same.noisy)
    boosted = replace_tokens(view, effect_rates(view, 0.1, 5.0), torch.arange(MASK), torch.Generator().manual_seed(1))
    effects, others = boosted.replaced[:, 1::2].float().mean(), boosted.replaced[:, 2::2].float().mean()
    assert 0.44 < float(effects) < 0.56 and 0.06 < float(others) < 0.14
    assert float(effect_rates(view, 0.5, 5.0).max()) == 1.0


def test_pairs_of_no_example_are_none():
    assert CausalPairs.collate([[], []]) is None
    pairs = CausalPairs.collate([[], [(3, 1, 0.5)]])
    assert (pairs.row.tolist(), pairs.effect.tolist(), pairs.cause.tolist(), pairs.weight.tolist()) == (
        [1],
        [3],
        [1],
        [0.5],
    )


def trained(folder: Path, losses, accumulate: int = 1, views=None) -> list[dict]:
    """Metric lines of a short training of a small model on views with causal pairs."""
    model = random_model(dtype=torch.float32)

    def of(index: int, block_phase: BlockPhase) -> list[NoisedBatch]:
        view = make_view(length=16, seed=index)
        view = paired(view, (9, 2), (14, 4), masked=[8, 14], replaced=[9])
        return [replace(view, time=view.time.float())]

    stage = TrainingTask(
        256, lambda tokens: BlockPhase(phase="stable", block_size=4, tokens=256), views if views is not None else of
    )
    knobs = TrainConfig(accumulate=accumulate, precision="no", learning_rate=LearningRate(peak=1e-3))
    train(SupervisedStep(model, losses), stage, knobs, folder, quiet=True)
    return [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]


def comparable(lines: list[dict]) -> list[tuple]:
    return [(line["loss"], line["gradient_norm"], line["losses"]["t2t"]) for line in lines]


def test_a_training_with_weight_zero_is_the_training_without_it(tmp_path: Path):
    without = trained(tmp_path / "a", {"t2t": TokenToToken()})
    zero = trained(tmp_path / "b", {"t2t": TokenToToken(), "c2dlm": CausalAttention(lambda_c=0.0)})
    some = trained(tmp_path / "c", {"t2t": TokenToToken(), "c2dlm": CausalAttention(lambda_c=0.5)})
    assert comparable(without) == comparable(zero) != comparable(some)
    assert [line["losses"]["c2dlm"] for line in zero] == [0.0] * len(zero)


def test_the_metrics_show_it_and_it_fades_with_the_training(tmp_path: Path):
    losses = {"t2t": TokenToToken(weight=0.0, keep=0.0), "c2dlm": CausalAttention(loss="mass", lambda_c=0.5)}
    lines = trained(tmp_path, losses)
    assert all(line["loss"] == pytest.approx(line["losses"]["c2dlm"]) for line in lines)
    assert lines[0]["losses"]["c2dlm"] > 0.5
    assert lines[-1]["losses"]["c2dlm"] < 0.4 * lines[0]["losses"]["c2dlm"]


def test_it_is_averaged_over_the_forwards_and_not_over_the_tokens(tmp_path: Path):
    """Two micro-batches, one of which has no graph: half the loss, and the step of half the gradient."""

    def views(graphs: list[bool]):
        def of(index: int, block_phase: BlockPhase) -> list[NoisedBatch]:
            view = paired(make_view(length=16), (9, 2), replaced=[9])
            view = replace(view, time=view.time.float())
            return [view if graphs[index % len(graphs)] else replace(view, pairs=None)]

        return of

    losses = {"t2t": TokenToToken(weight=0.0, keep=0.0), "c2dlm": CausalAttention(loss="mass", decay_from=1.0)}
    alone = trained(tmp_path / "one", losses, 1, views([True]))[0]
    two = trained(tmp_path / "two", losses, 2, views([True, False]))[0]
    assert two["losses"]["c2dlm"] == pytest.approx(alone["losses"]["c2dlm"] / 2)
    assert two["gradient_norm"] == pytest.approx(alone["gradient_norm"] / 2, rel=1e-5)


def test_SAFE_refuses_it_by_name_before_anything_is_loaded(tmp_path: Path):
    section = {"parent": "nowhere", "wsd": [], "losses": [{"name": "m2t"}, {"name": "c2dlm"}]}
    with pytest.raises(ConfigError, match="convert: 'c2dlm' is a FULL method"):
        convert(section, {}, tmp_path)
    with pytest.raises(ConfigError, match="profile 'safe'"):
        convert(section, {}, tmp_path, profile="safe")


def test_a_conversion_has_no_graphs_and_says_so(tmp_path: Path):
    phases = [{"phase": "stable", "block_size": 8, "tokens": 8}]
    section = {"parent": "nowhere", "block_size": 8, "wsd": phases, "losses": [{"name": "m2t"}, {"name": "c2dlm"}]}
    data = {"train": "a", "valid": "b", "sequence_length": 16, "pad_to_block": 8}
    with pytest.raises(ConfigError, match="'c2dlm' needs causal graphs"):
        convert(section, data, tmp_path, profile="FULL")


@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_where_answers_alone_are_doubled_the_same_rows_see_the_same(alignment):
    """A prompt of nine tokens, two of which are causes; the columns are others, the loss is not."""
    model = random_model(alignment=alignment)
    view = make_view(length=24, batch=2)
    answer = torch.arange(24) >= 9
    pairs = CausalPairs.collate([[(i, c, 1.0) for i in range(12, 24) for c in (2, 7, i - 2)]] * 2)
    view = replace(view, maskable=view.maskable & answer, masked=view.masked & answer, pairs=pairs)
    view = replace(view, noisy=torch.where(view.masked, MASK, view.clean))
    by_layout = {}
    for layout in ("double", "response"):
        losses = {"c2dlm": CausalAttention(apply="m2t", loss="mass", layers="all")}
        model.zero_grad()
        outcome = SupervisedStep(model, losses, layout=layout)(view)
        outcome.auxiliary.backward()
        by_layout[layout] = outcome.auxiliary.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert by_layout["double"][0] == pytest.approx(by_layout["response"][0], rel=1e-12)
    for a, b in zip(by_layout["double"][1], by_layout["response"][1], strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_a_bias_of_the_output_projection_is_no_part_of_the_norm():
    model = random_model("llama")
    projection = model.causal_lm.model.layers[1].self_attn.o_proj
    before = _gram(model, 1)
    projection.bias = torch.nn.Parameter(torch.ones(32, dtype=torch.float64))
    assert torch.allclose(_gram(model, 1), before, atol=1e-12)
    by_head = projection.weight.detach().unflatten(1, (4, 8)).movedim(1, 0)  # [heads hidden head_dim]
    assert torch.allclose(before, by_head.transpose(-1, -2) @ by_head, atol=1e-12)
