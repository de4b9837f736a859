"""The plan of an alignment: against the tensors of a real update, against arithmetic, and on the 8 GB card."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_memory_plan import CONFIGS, live_peak
from transformers import AutoConfig, AutoModelForCausalLM

from hildanext.cli import main
from hildanext.core.errors import ConfigError, HildaError
from hildanext.core.registry import under_profile
from hildanext.memory_plan.architecture import find_architecture, read_architecture
from hildanext.memory_plan.layer import FLOAT, Feed
from hildanext.memory_plan.machine import MACHINES
from hildanext.memory_plan.plan import make_plan
from hildanext.memory_plan.rl import alignment_case, alignment_peak, looks_of
from hildanext.memory_plan.rl_time import step_time
from hildanext.memory_plan.sections import rl_question
from hildanext.memory_plan.step import Case, standing_parts, weights_bytes
from hildanext.memory_plan.switches import RL_SWITCHES, advice, switched, worst_peak
from hildanext.models import Card, DiffusionModel
from hildanext.models.attention.dense import install_seam
from hildanext.models.card import alignment_fields
from hildanext.models.lora import add_lora
from hildanext.rl.batch import RolloutBatch
from hildanext.rl.config import RlConfig, Seams, read_config
from hildanext.rl.step import PolicyStep, PolicyView

PASCAL, BLOCK, PROMPT, ANSWER = MACHINES["pascal"], 8, 40, 64
ESPO = {"objective": {"name": "espo"}}
AGRPO = {"objective": {"name": "agrpo"}}
LORA = {"lora": {"rank": 8, "alpha": 8}}
RECOMPUTE = {"gradient_checkpointing": True}


def section(train: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "model": "", "group": 4, "problems_per_round": 2, "prompting": "text",
        "rollouts": {"name": "engine", "max_new_tokens": ANSWER, "per_step": 4, "slots": 8},
        "measure": {"problems": 8, "samples": 0}, "train": {"batch_size": 2, "chunk": 64, **(train or {})}, **more,
    }  # fmt: skip


def read(made: dict[str, Any]) -> tuple[RlConfig, Seams]:
    with under_profile("FULL"):
        return read_config(made)


def policy(config: RlConfig) -> DiffusionModel:
    """Widths that share no factor with one another, and a vocabulary whose logits show."""
    fields = {
        "vocab_size": 1000, "hidden_size": 168, "intermediate_size": 352, "num_hidden_layers": 4,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True,
    }  # fmt: skip
    causal_lm = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("qwen3", **fields), attn_implementation=install_seam()
    ).float()
    model = DiffusionModel(
        causal_lm, Card(mask_id=997, vocab_rows=1000, vocab_real=997, block_size=BLOCK, **alignment_fields("block"))
    )
    if config.lora is not None:
        add_lora(model, config.lora)
    if config.train.gradient_checkpointing:
        model.recompute_layers()
    return model


def answers(rows: int, group: int) -> RolloutBatch:
    """Answers as long as they may be, of which each step of a block wrote four tokens."""
    shape, width = (rows, PROMPT + ANSWER), PROMPT + ANSWER
    tokens, position = torch.randint(0, 900, shape), torch.arange(width).expand(shape).contiguous()
    tokens[:, :PROMPT] = tokens[:1, :PROMPT]
    written = position >= PROMPT
    nothing = torch.zeros(shape, dtype=torch.float64)
    return RolloutBatch(
        tokens=tokens, document=torch.zeros(shape, dtype=torch.long), position=position,
        prompt=torch.full((rows,), PROMPT), scored=written, after=torch.zeros(shape, dtype=torch.bool),
        step=torch.where(written, position % BLOCK // 4, -1), logp=nothing, entropy=nothing,
        group=torch.arange(rows) // group, edits=torch.zeros(0, 5, dtype=torch.long),
    )  # fmt: skip


@pytest.mark.parametrize(
    "made",
    [
        section(**ESPO), section(RECOMPUTE, **ESPO), section(**ESPO, **LORA), section(RECOMPUTE, **ESPO, **LORA),
        section(**ESPO, packed=False), section(**AGRPO), section(**AGRPO, **LORA),
    ],
    ids=["espo", "recompute", "lora", "lora recompute", "unpacked", "agrpo", "agrpo lora"],
)  # fmt: skip
def test_an_update_s_tensors_are_what_the_plan_says(made: dict[str, Any]):
    """Of a micro-batch: a twentieth too little at most, and too much by an eighth, where layers are computed again a
    sixth."""
    config, seams = read(made)
    model, batch = policy(config), answers(8, 4)
    looks = seams.likelihood.draw(batch, model.card, torch.Generator().manual_seed(1))
    looks = looks[:1] if seams.objective.separable else looks
    view = PolicyView(batch, looks, torch.randn(8), torch.ones(8, dtype=torch.bool), 8)
    step = PolicyStep(model, seams.objective, 1.0, config.train.chunk, config.packed).train()

    def work() -> None:
        step(view).total.backward()
        step.zero_grad(set_to_none=True)

    work()
    shape = read_architecture(model.causal_lm.config.to_dict(), "qwen3")
    case = alignment_case(config, seams, shape, BLOCK, PROMPT, FLOAT, True)
    case = replace(case, several=False, rollouts=replace(case.rollouts, arrays=0))
    moments = alignment_peak(case, 0).moments
    planned = max(moments[f"update: {name}"] for name in ("loss", "backward begins", "backward ends"))
    assert (
        0.95
        <= (planned - sum(standing_parts(case).values())) / live_peak(work)
        <= (1.16 if config.train.gradient_checkpointing else 1.13)
    )


def case_of(**changes: Any) -> Case:
    config, seams = read(section(**changes))
    return alignment_case(config, seams, find_architecture("qwen3-0.6b"), 32, 100, FLOAT, False)


class TestFormulas:
    def test_columns_of_a_packed_group_by_hand(self):
        """100 tokens of prompt are 3 whole blocks of 32; with 64 of answer it ends at 192. Noisy: 4 x 96; clean: 96,
        and of each answer all but its last block, 4 x 64."""
        feed = case_of().feed
        assert feed == Feed(2, 4 * 96, 96 + 4 * 64, 32, True, branches=4, shared=96)
        assert feed.attended == (2 * 4, 96, 64, 96 + 64), "rows, noisy and clean columns, clean keys"
        assert case_of(group=2).feed == Feed(2, 2 * 96, 96 + 2 * 64, 32, True), "two attend as a whole"
        assert case_of(packed=False).feed == Feed(8, 96, 160, 32, True)

    def test_keys_and_values_of_the_answers_by_hand(self):
        """8 answers of 192 tokens, 28 layers, 8 heads of 128, 4 bytes; what is kept of others goes to the limit. They
        lie in stretches of 64: those of 224 tokens in 256."""
        one = 2 * 28 * 8 * 128 * 4
        plenty = case_of(measure={"problems": 100, "samples": 0})
        limited = case_of(
            measure={"problems": 100, "samples": 0},
            rollouts={"name": "engine", "max_new_tokens": ANSWER, "slots": 8, "cache_mib": 200},
        )
        rollouts = [alignment_peak(case, 0).moments["rollouts"] for case in (case_of(), plenty, limited)]
        assert rollouts[1] - rollouts[0] == pytest.approx(92 * 192 * one, rel=0.01)
        assert rollouts[2] - rollouts[0] == pytest.approx(200 * 2**20 - 8 * 192 * one, rel=0.06)
        config, seams = read(section())
        longer = alignment_case(config, seams, find_architecture("qwen3-0.6b"), 32, 160, FLOAT, False)
        assert longer.rollouts.context == 224 and longer.rollouts.kept == 8 * 256

    def test_logits_of_the_rollouts_by_hand(self):
        """A CPU makes those that are filled alone, a GPU those of the whole block."""
        shape = find_architecture("qwen3-0.6b")
        config, seams = read(section())
        for on_cpu, rows, size in ((True, 4, 24), (False, 32, 20)):
            case = alignment_case(config, seams, shape, 32, 100, FLOAT, on_cpu)
            assert (case.rollouts.read, case.rollouts.filled) == (rows, 4)
            peak = alignment_peak(replace(case, rollouts=replace(case.rollouts, arrays=0)), 0)
            cache = 8 * 192 * 2 * 28 * 8 * 128 * 4
            assert peak.moments["rollouts"] - sum(standing_parts(case).values()) - cache == 8 * rows * size * 151936

    def test_looks(self):
        def looks(**likelihood: Any) -> int:
            objective = {"name": "espo"}
            return looks_of(read(section(objective=objective, likelihood=likelihood))[1], 32)

        assert looks(name="block_elbo") == 2 and looks(name="block_elbo", draws=3) == 6
        assert looks(name="mean_field") == looks(name="left_to_right") == 1
        assert looks(name="trajectory") == 8 and looks(name="trajectory", steps=3) == 3
        assert looks(name="trajectory", segments=2) == 2

    def test_a_reference_is_a_copy_where_there_are_no_adapters(self):
        shape = find_architecture("qwen3-0.6b")
        held = {"objective": {"name": "espo", "beta": 0.1}}
        assert alignment_peak(case_of(**held), 0).parts["reference"] == weights_bytes(shape, False)
        for other in (case_of(), case_of(**held, **LORA)):
            assert alignment_peak(other, 0).parts["reference"] == 0

    def test_every_graph_of_espo_lives_at_once_and_one_of_agrpo(self):
        assert case_of().rollouts.graphs == 2 and case_of(**AGRPO).rollouts.graphs == 1
        assert case_of(**AGRPO).several and not case_of().several

    def test_states_that_rest_take_nothing_but_in_the_step(self):
        resting, awake = case_of(train={"batch_size": 2, "offload": "optimizer"}), case_of(train={"batch_size": 2})
        states = standing_parts(awake)["optimizer"]
        moments, others = alignment_peak(resting, 0).moments, alignment_peak(awake, 0).moments
        assert {name: others[name] - moments[name] for name in moments if name != "update: step"} == {
            name: states for name in moments if name != "update: step"
        }
        assert moments["update: step"] == others["update: step"]

    @pytest.mark.parametrize("switch", RL_SWITCHES, ids=lambda switch: switch.name)
    def test_no_switch_takes_more(self, switch: Any):
        more = LORA if "nf4" in switch.name else {"objective": {"name": "espo", "beta": 1.0}}
        rollouts = {"name": "engine", "slots": 64}
        start = case_of(train={"batch_size": 2, "chunk": 256}, rollouts=rollouts, problems_per_round=16, **more)
        changed = switch.on(start)
        assert changed is not None and alignment_peak(changed, 0).total <= alignment_peak(start, 0).total


class TestQuestions:
    def test_what_decides_is_said_and_what_helps(self):
        rollouts = {"name": "engine", "max_new_tokens": ANSWER, "slots": 64}
        made = section({"batch_size": 1, **RECOMPUTE}, rollouts=rollouts, problems_per_round=16, **LORA)
        question = rl_question(made, PASCAL, "qwen3-0.6b", 32)
        assert worst_peak(question, 0).moment == "rollouts", "logits of 64 answers"
        fewer = switched(question, [RL_SWITCHES[1]])
        assert fewer is not None and worst_peak(fewer, 0).total < worst_peak(question, 0).total
        plan = make_plan(question, PASCAL, 8 * 2**30)
        assert not plan.fits and plan.advised is not None and "rl.rollouts.slots=8" in plan.advised
        assert advice(question, PASCAL.framework, 2**40) == ([], worst_peak(question, PASCAL.framework))

    def test_what_is_assumed_is_said(self):
        question = rl_question(section(objective={"name": "espo", "beta": 0.1}), PASCAL, "qwen3-0.6b", 16, 90)
        assert question.block_size == 16
        assert any("prompts of 90 tokens and answers of 64" in words for words in question.assumes)
        assert any("frozen copy" in words for words in question.assumes)

    def test_mistakes(self):
        with pytest.raises(ConfigError, match="is not there to be looked at"):
            rl_question(section(), PASCAL)
        with pytest.raises(HildaError, match="grup"):
            rl_question(section(grup=3), PASCAL, "tiny")

    @pytest.mark.parametrize(
        ("name", "minutes"), [("qwen3-0.6b-8gb", (4.6, 5.5)), ("qwen3-1.7b-8gb-qlora", (15.8, 19.0))]
    )
    def test_the_runs_of_the_8_gb_card_fit_it_and_say_how_long_a_step_takes(
        self, name: str, minutes: tuple[float, float], capsys: pytest.CaptureFixture[str]
    ):
        arguments = ["plan", "--config", str(CONFIGS / f"{name}.json"), "--machine", "pascal", "--prompt", "160"]
        for memory, fits in (("8GiB", True), ("3GiB", False)):
            main([*arguments, "--json", "--vram", memory])
            stages = {stage["stage"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}
            assert stages["rl"]["fits"] == fits and name.startswith(stages["rl"]["model"])
            assert stages["rl"]["step_seconds"] == pytest.approx([60 * one for one in minutes], rel=0.02)
            assert stages["sft"]["step_seconds"] is None
        main([*arguments, "--vram", "8GiB"])
        assert "minutes on a GTX 1080" in " ".join(capsys.readouterr().out.split())

    def test_a_step_s_columns_by_hand(self):
        """Two groups of four answers of 64 tokens behind 100: 384 noisy and 352 clean columns a group; sixteen
        forwards of 32 columns an answer, its 64 clean ones, and the prompt once."""

        def told(**changes: Any) -> Any:
            config, seams = read(section(**changes))
            shape = find_architecture("qwen3-0.6b")
            case = alignment_case(config, seams, shape, 32, 100, FLOAT, False)
            return step_time(config, seams, case, looks_of(seams, 32), 100)

        plain, held = told(), told(objective={"name": "espo", "beta": 0.1})
        assert (plain.update, plain.known) == (2 * 2 * (384 + 352), 0) and held.known == plain.update
        assert plain.rollouts == 2 * (4 * (16 * 32 + 64) + 100)
        work = 6 * plain.update + 2 * plain.rollouts
        assert plain.seconds == pytest.approx((work / (6 * 649), work / (6 * 541)), rel=0.01)
        assert told(**LORA).seconds[0] < plain.seconds[0] < told(train={"batch_size": 2, **RECOMPUTE}).seconds[0]
        twice = told(updates=2)
        assert twice.rollouts == plain.rollouts // 2 and twice.known == plain.update
        threshold = {"name": "engine", "max_new_tokens": ANSWER, "decoder": {"name": "threshold_edit"}}
        assert told(rollouts=threshold) is None
