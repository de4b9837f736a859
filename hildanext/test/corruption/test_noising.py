"""A batch to noised views: what may be hidden, and that a generator alone decides."""

import pytest
import torch

from conftest import random_model
from hildanext.core.errors import ConfigError
from hildanext.corruption.noising import NoiseConfig, noised
from hildanext.data.batch import Batch
from hildanext.diffusion import NoisedBatch, targets

REAL = torch.arange(3, 61)


def packed(rows: int = 32, seed: int = 0) -> Batch:
    """Rows of two documents, the second the rest of one that was cut: no BOS, so its first token is maskable."""
    tokens = torch.randint(3, 61, (rows, 16), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = 0
    document = torch.tensor([[0] * 8 + [1] * 4 + [-1] * 4]).repeat(rows, 1)
    position = torch.tensor([[*range(8), *range(4), 0, 0, 0, 0]]).repeat(rows, 1)
    maskable = (document >= 0) & ~((position == 0) & (tokens == 0))
    return Batch(tokens, document, position, maskable)


def views(alignment: str, block_size: int, seed: int = 0, **knobs: object) -> list[NoisedBatch]:
    card = random_model(alignment=alignment).card
    generator = torch.Generator().manual_seed(seed)
    return noised(packed(), block_size, NoiseConfig(**knobs), card, REAL, generator)


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("complementary", [False, True])
def test_a_token_that_is_never_predicted_is_never_hidden(block_size: int, complementary: bool):
    """Under the left shift nothing stands before the first token of a document, at training as at inference."""
    batch = packed()
    predictable = targets(batch.maskable, batch.position, "left")
    assert bool((batch.maskable & ~predictable).any()), "the batch holds such tokens"
    for view in views("parent", block_size, complementary=complementary, replace_rate=1.0):
        assert torch.equal(view.maskable, predictable)
        assert torch.equal(view.noisy[~predictable], batch.tokens[~predictable])
    hidden = [view.masked[:, 8] for view in views("block", block_size, complementary=complementary)]
    assert bool(torch.stack(hidden).any()), "without a shift it is predicted, and hidden, like any other"


def test_a_complementary_pair_hides_every_predictable_token_once():
    one, other = views("parent", 4, complementary=True)
    assert torch.equal(one.masked ^ other.masked, one.maskable) and not bool((one.masked & other.masked).any())


def test_at_block_size_one_everything_predictable_is_hidden():
    [view] = views("parent", 1, complementary=True)
    assert torch.equal(view.masked, view.maskable) and bool((view.time == 1).all())


def test_the_generator_alone_decides():
    one, again, other = (views("parent", 4, seed)[0].noisy for seed in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize("t_range", [(0.9, 0.1), (0.0, 1.0), (0.5, 1.5)])
def test_a_range_of_noise_levels_that_is_none_is_refused(t_range: tuple[float, float]):
    with pytest.raises(ConfigError, match=rf"t_range {t_range[0]}, {t_range[1]}: give 0 < low < high <= 1"):
        NoiseConfig(t_range=t_range)
