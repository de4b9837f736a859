"""Matrices in oneDNN's layout: the same numbers, and a row's bits are its own."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from hildanext.ar import Parent
from hildanext.core.errors import ModelError
from hildanext.decoding.exact.network import network_of
from hildanext.decoding.exact.policy import ExactConfig
from hildanext.exact import generate_exact, placing_for
from hildanext.inference import GenerationConfig
from hildanext.kv_cache.draft_attention import DraftSegment, attention_alone
from hildanext.models.drafter import Drafter
from hildanext.models.gated_lora import GatedLoraConfig
from hildanext.models.packed_linear import PackedGroup, PackedLinear, pack, pack_linears, packs, product, rows_alone
from small_models import small_causal

pytestmark = pytest.mark.skipif(
    not packs(torch.zeros(1, dtype=torch.bfloat16)), reason="this processor has no packed matrices in bf16"
)
WIDE = {"hidden_size": 64, "intermediate_size": 1536, "vocab_size": 96, "initializer_range": 0.2}


def drafter(family: str = "llama", enter: int = 0, tied: bool = True, bias: bool = False) -> Drafter:
    more = {"attention_bias": True} if bias else {}
    causal_lm = small_causal(family, tied=tied, **WIDE, **more).bfloat16()
    model = Drafter(causal_lm, GatedLoraConfig(rank=4), 3, enter, False, 5)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        for name, part in causal_lm.named_parameters():
            if name.endswith("bias"):
                part.copy_(torch.randn(part.shape, generator=generator))
    return model.eval().requires_grad_(False)


def test_the_numbers_are_those_of_the_plain_layer_and_the_matrix_comes_back() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix, bias, rows = (
        torch.randn(*shape, generator=generator).bfloat16() for shape in ((70, 33), (70,), (2, 9, 33))
    )
    packed = pack(matrix)
    assert torch.equal(packed.to_dense(), matrix)
    for part in (rows, rows[:1, :1], rows[:1, :3]):
        torch.testing.assert_close(product(part, packed, bias), linear(part, matrix, bias), rtol=1e-2, atol=5e-2)


def test_a_rows_bits_are_its_own_however_long_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(576, 1536, generator=generator).bfloat16()
    rows = (torch.randn(300, 1536, generator=generator) * torch.randn(300, 1536, generator=generator).exp()).bfloat16()
    packed = pack(matrix)
    together = product(rows, packed)
    for size in (1, 2, 3, 4, 5, 9, 16, 25, 60):
        assert torch.equal(torch.cat([product(part, packed) for part in rows.split(size)]), together), size


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("bias", [False, True])
def test_groups_of_layers_say_what_each_of_them_said(family: str, bias: bool) -> None:
    plain, packed = drafter(family, bias=bias), drafter(family, bias=bias)
    pack_linears(packed.causal_lm)
    matrices = [
        (one, other) for name, other in packed.causal_lm.named_modules() if isinstance(other, PackedLinear)
        for one in (plain.causal_lm.get_submodule(name),)
    ]  # fmt: skip
    assert len(matrices) == 2 * 7 + 1
    for one, other in matrices:
        weight = getattr(one, "base_layer", one).weight
        assert torch.equal(other.weight, weight) and other.in_features == weight.shape[1]
    exact = _states(plain.double())
    far = [float((_states(model) - exact).abs().mean()) for model in (drafter(family, bias=bias), packed)]
    assert 0 < far[1] < 1.3 * far[0] < 0.1  # as far as bf16 is without


def _states(model: Drafter) -> Tensor:
    """Clean rows, then masks."""
    network = network_of(model)
    cache = network.new_cache(128)
    with torch.inference_mode():
        return network.forward([5, 9, 11], [cache], [DraftSegment(0, 3, (0, 2), 3)]).float()


@pytest.mark.parametrize("enter", [0, 1])
def test_a_clean_rows_bits_do_not_depend_on_drafts_and_masks(enter: int) -> None:
    model = drafter(enter=enter)
    assert not network_of(model).rows_alone
    pack_linears(model.causal_lm)
    network = network_of(model)
    assert network.rows_alone and rows_alone(model.causal_lm) and attention_alone(torch.bfloat16)
    text = [(7 * at) % 90 + 3 for at in range(160)]

    @torch.inference_mode()
    def of(start: int, clean: int, points: tuple[int, ...], places: int) -> Tensor:
        cache = network.new_cache(start + 64)
        network.forward(text[:start], [cache], [DraftSegment(0, start, (), 0)])
        segment = DraftSegment(start, clean, points, places)
        return network.logits(network.forward(text[start : start + clean], [cache], [segment])[:clean])

    for start in (20, 61, 62, 63, 64, 100, 126):
        alone = of(start, 1, (), 0)[0]
        for clean, points, places in ((2, (), 0), (4, (), 0), (1, (0,), 2), (3, (0, 1, 2), 2), (4, (0, 1, 2, 3), 3)):
            assert torch.equal(of(start, clean, points, places)[0], alone), (start, clean, points)


@pytest.mark.parametrize("after", ["all", "last"])
def test_in_bf16_the_text_is_the_parents_at_one_row(after: str) -> None:
    model = drafter()
    pack_linears(model.causal_lm)
    settings = GenerationConfig(max_new_tokens=40, ignore_eos=True, batch_size=1)
    prompts = [[5 + at, 9, 11 + at] for at in range(6)]
    answers = []
    for config in (ExactConfig(drafter="none"), ExactConfig(after=after)):
        placing = placing_for(model, config)
        assert not placing.fixed
        answers.append(generate_exact(model, None, prompts, config, settings, placing))
    assert [answer.tokens for answer in answers[0]] == [answer.tokens for answer in answers[1]]
    assert max(len(set(answer.tokens)) for answer in answers[0]) > 5
    assert all(answer.stats.rows == 40 for answer in answers[0])  # one row a forward


def test_what_the_device_has_no_layout_for_stays_as_it_is() -> None:
    model = drafter().float()
    pack_linears(model.causal_lm)
    assert not any(isinstance(layer, PackedLinear) for layer in model.causal_lm.modules())
    assert not rows_alone(model.causal_lm) and network_of(model).rows_alone
    half = drafter(tied=False).half()
    pack_linears(half.causal_lm)
    assert not network_of(half).rows_alone and placing_for(half, ExactConfig()).fixed


def test_nobody_learns_through_packed_layers() -> None:
    model = drafter(tied=False)
    pack_linears(model.causal_lm)
    tokens = torch.tensor([[5, 9, 11]])
    states = torch.randn(1, 3, 64).bfloat16().requires_grad_()
    with pytest.raises(ModelError, match="no gradients"):
        model.causal_lm.get_output_embeddings()(states)
    document, position = torch.zeros_like(tokens), torch.arange(3)[None]
    parent = Parent(model.causal_lm, None)
    assert parent.logits(parent.hidden(tokens, document, position)).isfinite().all()


def test_a_group_is_asked_in_order_and_forgets_what_it_computed() -> None:
    layers = [nn.Linear(8, size, bias=False).bfloat16() for size in (3, 5)]
    group = PackedGroup(layers)
    first, second = torch.randn(2, 1, 4, 8).bfloat16()
    with torch.no_grad():
        for rows in (first, second, first):
            for number, layer in enumerate(layers):
                torch.testing.assert_close(group.ask(number, rows), layer(rows), rtol=1e-2, atol=5e-2)
        assert group._rows is None
