"""What a step takes where the parent stays: the plan against the tensors of a real one, and the 8 GB configurations."""

from itertools import product
from pathlib import Path

import pytest
import torch
from test_memory_plan import CONFIGS, live_peak
from transformers import AutoConfig, AutoModelForCausalLM

from hildanext.core.config import read_json
from hildanext.losses.draft import DraftLossConfig, DraftNoise, DraftStep
from hildanext.memory_plan.architecture import read_architecture
from hildanext.memory_plan.layer import Feed, Learning
from hildanext.memory_plan.machine import CARD, MACHINES
from hildanext.memory_plan.plan import make_plan
from hildanext.memory_plan.sections import convert_question, copied_keys, kept_of_a_row
from hildanext.memory_plan.step import Case, training_peak
from hildanext.models.attention.dense import install_seam
from hildanext.models.drafter import Drafter
from hildanext.models.gated_lora import GatedLoraConfig
from noised_examples import make_view

PLACES, CHUNK = 4, 64


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("family", "narrow"), [("llama", 4), ("qwen3", 4), ("qwen3", 2)])
def test_a_step_s_tensors_are_what_the_plan_says(family: str, narrow: int, recompute: bool):
    """In fp32 within an eighth; in bf16 the plan says up to a quarter too much. It never says much too little."""
    fields = {
        "vocab_size": 2000, "hidden_size": 168, "intermediate_size": 352, "num_hidden_layers": 4,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True,
    }  # fmt: skip
    config = AutoConfig.for_model(family, **fields)
    dtype = torch.float32 if narrow == 4 else torch.bfloat16
    causal_lm = AutoModelForCausalLM.from_config(config, attn_implementation=install_seam()).to(dtype)
    lora = GatedLoraConfig(rank=8)
    drafter = Drafter(causal_lm, lora, PLACES)
    if recompute:
        drafter.recompute_layers()
    shape = read_architecture(causal_lm.config.to_dict(), family)
    for batch, length, groups in product((1, 2), (128, 256), (16, 64)):
        step = DraftStep(drafter, DraftLossConfig(groups=groups), CHUNK, DraftNoise()).train()
        view = make_view(length=length, batch=batch, block=length, documents=[0] * length)

        def work(step: DraftStep = step, view: object = view) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow == 2):
                total = step(view, generator=torch.Generator().manual_seed(0)).total
            total.backward()
            step.zero_grad(set_to_none=True)

        work()
        masks = groups * PLACES
        case = Case(
            shape=shape,
            feed=Feed(batch, masks, 0, PLACES, False, copied_keys(length, groups, PLACES)),
            how=Learning(narrow, lora.rank, lora.targets, False),
            chunk=CHUNK,
            supervised=batch * masks,
            teacher="own",
            recompute=recompute,
            on_cpu=True,
            frozen=narrow,
            kept=batch * length * kept_of_a_row(shape, length, 0, narrow),
        )
        peak = training_peak(case, 0)
        standing = peak.parts["weights"] + peak.parts["optimizer"]
        planned = max(total for name, total in peak.moments.items() if name != "step") - standing
        high = 1.13 if narrow == 4 else 1.26
        assert 0.95 <= planned / live_peak(work) <= high, (batch, length, groups)


@pytest.mark.parametrize(
    ("name", "quantize", "fits"), [("qwen3-0.6b", None, True), ("qwen3-0.6b", "nf4", True), ("qwen3-1.7b", "nf4", True),
                                   ("qwen3-1.7b", None, False)]
)  # fmt: skip
def test_the_parents_of_the_8_gb_configuration_stay_on_the_card(name: str, quantize: str | None, fits: bool):
    run = read_json(Path(CONFIGS) / "qwen3-0.6b-8gb-keep-parent.json")
    section = {**run["convert"], "parent": name, "quantize": quantize}
    plan = make_plan(convert_question(section, run["data"], MACHINES[CARD[0]]), MACHINES[CARD[0]], CARD[1])
    assert plan.fits is fits
