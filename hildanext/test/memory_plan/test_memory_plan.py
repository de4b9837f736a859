"""Plans against what is really kept, against arithmetic, and as a person sees them."""

import importlib.util
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hildanext.cli import main
from hildanext.core.config import read_json
from hildanext.core.errors import ConfigError, ModelError
from hildanext.core.runtime import accelerates_bf16, choose_device, total_memory
from hildanext.corruption.input_layout import build_layout
from hildanext.losses.objective import attention_for
from hildanext.memory_plan import machine as memory_plan_machine
from hildanext.memory_plan.architecture import Architecture, find_architecture, read_architecture
from hildanext.memory_plan.layer import (
    FLOAT,
    Feed,
    Learning,
    kept_after,
    kept_attention,
    kept_before,
    kept_casts,
    learning,
)
from hildanext.memory_plan.machine import MACHINES, find_machine, read_bytes, show_bytes
from hildanext.memory_plan.plan import make_plan, verdict
from hildanext.memory_plan.sections import Question, convert_question, serving_question, sft_question
from hildanext.memory_plan.serving import Serving, serving_peak
from hildanext.memory_plan.step import EIGHT_BIT, NF4_BYTES, Case, training_peak, weights_bytes
from hildanext.memory_plan.switches import SWITCHES, advice, longest_context, switched, worst_peak
from hildanext.models import Card, DiffusionModel
from hildanext.models.attention.dense import install_seam
from hildanext.models.card import alignment_fields
from hildanext.models.lora import LoraConfig, add_lora
from hildanext.models.quantize import place
from noised_examples import make_view

CONFIGS = Path(__file__).parents[2] / "runs" / "configs"
BENCHES = {"frontier-tiny", "ablations-tiny", "ablations"}
"""What these measure is no stage that trains."""
PLANNED = sorted(path for path in CONFIGS.rglob("*.json") if path.stem not in BENCHES)
MIB = 2**20
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
TARGETS = LoraConfig().targets
PASCAL = MACHINES["pascal"]


def odd_model(family: str, layers: int) -> DiffusionModel:
    """Widths that share no factor with one another, so that a wrong coefficient shows."""
    fields = {
        "vocab_size": 64, "hidden_size": 168, "intermediate_size": 352, "num_hidden_layers": layers,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True,
    }  # fmt: skip
    config = AutoConfig.for_model(family, **fields)
    causal_lm = AutoModelForCausalLM.from_config(config, attn_implementation=install_seam()).float()
    card = Card(mask_id=61, vocab_rows=64, vocab_real=61, block_size=8, **alignment_fields("parent"))
    return DiffusionModel(causal_lm, card)


def kept(model: DiffusionModel, batch: int, length: int, layout: str, narrow: int) -> int:
    """Bytes that autograd keeps of a forward, by storage, the parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    sizes: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            alive.append(tensor)
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    view = make_view(length=length, batch=batch, block=8 if layout == "double" else length, documents=[0] * length)
    fed = build_layout(view, layout)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=narrow < FLOAT),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        embeddings = model.embed(fed.tokens(view), 0.0, None, fed.token, fed.seq)
        attention = attention_for(view, fed, "token_causal", embeddings)
        model.train()(embeddings, fed.rows(view).position, attention)
    return sum(sizes.values())


LEARNING = [(None, False), (4, False), (4, True)]


@pytest.mark.parametrize(
    ("family", "rank", "packed"), [(f, *k) for f, k in product(("llama", "qwen2", "qwen3"), LEARNING)]
)
def test_a_layer_keeps_what_the_formula_says(family: str, rank: int | None, packed: bool):
    """The second layer of two, by the difference; doubled and single input, one row and two, both precisions."""
    if packed and not HAS_BITSANDBYTES:
        pytest.skip("bitsandbytes is not installed (the extra 'quant')")
    models = []
    for layers in (1, 2):
        model = odd_model(family, layers)
        if packed:
            place(model.causal_lm, torch.float32, "cpu", "nf4")
        if rank is not None:
            add_lora(model, LoraConfig(rank=rank))
        models.append(model)
    shape = read_architecture(models[0].causal_lm.config.to_dict(), family)
    how_many = product((1, 2), (32, 64), ("double", "single"), (2, 4))
    for batch, length, layout, narrow in how_many:
        one, two = (kept(model, batch, length, layout, narrow) for model in models)
        fed = Feed(batch, length, length if layout == "double" else 0, 8, layout == "double")
        how = Learning(narrow, rank, TARGETS if rank is not None else (), packed)
        parts = [part(shape, fed, how) for part in (kept_before, kept_after, kept_attention)]
        assert sum(parts) + kept_casts(shape, how) == pytest.approx(two - one, rel=0.02), (
            batch,
            length,
            layout,
            narrow,
        )


def live_peak(work: Any) -> int:
    """The most bytes of tensors that lived at once while `work` ran, as torch's profiler saw them come and go."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    moves = sorted(
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    live = peak = 0
    for _, change in moves:
        live += change
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("rank", "narrow"), list(product((None, 8), (2, 4))))
def test_a_step_s_tensors_are_within_a_tenth_of_the_plan(rank: int | None, narrow: int, recompute: bool):
    from hildanext.losses import SupervisedStep
    from hildanext.losses.mask_to_token import MaskToToken

    model = odd_model("qwen3", 4)
    if rank is not None:
        add_lora(model, LoraConfig(rank=rank))
    if recompute:
        model.recompute_layers()
    step = SupervisedStep(model, {"m2t": MaskToToken()}, chunk=64).train()
    view = make_view(length=256, batch=2, block=8, documents=[0] * 256)

    def work() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow == 2, cache_enabled=not recompute):
            total = step(view).total
        total.backward()
        step.zero_grad(set_to_none=True)

    work()
    shape = read_architecture(model.causal_lm.config.to_dict(), "qwen3")
    how = Learning(narrow, rank, TARGETS if rank is not None else (), False)
    case = Case(shape, Feed(2, 256, 256, 8, True), how, 64, 512, "none", recompute=recompute, on_cpu=True)
    peak = training_peak(case, 0)
    standing = (
        weights_bytes(shape, False) + (case.learning * FLOAT if rank is not None else 0) + peak.parts["optimizer"]
    )
    moments = [total - standing for name, total in peak.moments.items() if name != "step"]
    assert max(moments) == pytest.approx(live_peak(work), rel=0.1)


class TestArchitecture:
    @pytest.mark.parametrize(
        ("name", "millions", "embedding"),
        [("smollm2-135m", 134.5, 28.3), ("qwen3-0.6b", 596.0, 155.6), ("qwen3-1.7b", 1720.6, 311.2)],
    )
    def test_known_models_have_their_published_sizes(self, name: str, millions: float, embedding: float, monkeypatch):
        monkeypatch.setenv("HILDANEXT_HOME", "/nowhere")
        shape = find_architecture(name)
        assert shape.parameters / 1e6 == pytest.approx(millions, abs=0.06)
        assert shape.embedding / 1e6 == pytest.approx(embedding, abs=0.06)

    def test_adapters_of_rank_16_are_10_and_17_million(self):
        assert find_architecture("qwen3-0.6b").adapters(16, TARGETS) / 1e6 == pytest.approx(10.1, abs=0.05)
        assert find_architecture("qwen3-1.7b").adapters(16, TARGETS) / 1e6 == pytest.approx(17.4, abs=0.05)

    @pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
    @pytest.mark.parametrize("tied", [True, False])
    def test_every_parameter_is_counted(self, family: str, tied: bool):
        config = AutoConfig.for_model(
            family, vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, tie_word_embeddings=tied,
        )  # fmt: skip
        with torch.device("meta"):
            real = AutoModelForCausalLM.from_config(config)
        shape = read_architecture(config.to_dict() | {"architectures": [type(real).__name__]}, family)
        assert shape.parameters == sum(p.numel() for p in {id(p): p for p in real.parameters()}.values())

    def test_a_config_file_alone_is_enough(self, tmp_path: Path):
        fields = read_json(Path(find_config("qwen3-0.6b")))
        (tmp_path / "config.json").write_text(json.dumps(fields))
        for name in (tmp_path, tmp_path / "config.json"):
            assert find_architecture(str(name)).parameters == find_architecture("qwen3-0.6b").parameters

    def test_what_is_not_there_is_said(self, tmp_path: Path):
        with pytest.raises(ModelError, match="no model 'qwen9'"):
            find_architecture("qwen9")
        with pytest.raises(ModelError, match="has not been pulled"):
            find_architecture("someone/their-model")
        (tmp_path / "config.json").write_text('{"model_type": "qwen3", "hidden_size": 8}')
        with pytest.raises(ModelError, match="num_attention_heads"):
            find_architecture(str(tmp_path))

    def test_what_a_configuration_leaves_out_is_transformers_own(self):
        """Qwen3 has heads of 128, whatever hidden / heads is."""
        fields = read_json(Path(find_config("qwen3-0.6b")))
        whole = read_architecture(fields, "x")
        assert (whole.head_dim, whole.hidden // whole.heads) == (128, 64)
        assert read_architecture({name: fields[name] for name in fields if name != "head_dim"}, "x") == whole
        assert read_architecture(fields | {"head_dim": None}, "x") == whole
        assert read_architecture(fields | {"num_key_value_heads": None}, "x").kv_heads == fields["num_attention_heads"]
        assert not read_architecture(fields | {"tie_word_embeddings": None}, "x").tied
        assert (
            read_architecture(
                fields | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": None}, "x"
            ).head_dim
            == 64
        )

    @pytest.mark.parametrize("changes", [{"num_attention_heads": 0}, {"num_hidden_layers": 10**6}, {"vocab_size": "9"}])
    def test_sizes_that_cannot_be_are_one_line(self, changes: dict[str, Any]):
        with pytest.raises(ModelError, match=next(iter(changes))):
            read_architecture(read_json(Path(find_config("qwen3-0.6b"))) | changes, "x")


def find_config(name: str) -> str:
    import hildanext

    return str(Path(hildanext.__file__).parent / "assets" / "architectures" / f"{name}.json")


def step_of(
    name: str = "qwen3-0.6b", length: int = 1024, lora: LoraConfig | None = None, packed: bool = False, **more: Any
) -> Case:
    shape = find_architecture(name)
    fed = Feed(more.pop("batch", 1), length, length, 32, True)
    how = learning(lora, packed, more.pop("narrow", FLOAT))
    return Case(shape, fed, how, more.pop("chunk", 256), fed.batch * length, "none", **more)


class TestFormulas:
    def test_standing_parts_by_hand(self):
        """Full fine-tuning of 596.05 M weights: 4 bytes each, gradients 4, AdamW 8, its 8-bit form 2.03."""
        n = find_architecture("qwen3-0.6b").parameters
        parts = training_peak(step_of(recompute=True), 0).parts
        assert parts["weights"] == 4 * n and parts["optimizer"] == 8 * n and parts["gradients"] >= 4 * n
        eight = training_peak(step_of(recompute=True, eight_bit=True), 0).parts
        assert eight["optimizer"] == int(EIGHT_BIT * n) and EIGHT_BIT == 2.03125

    def test_4_bits_take_0_516_bytes(self):
        shape = find_architecture("qwen3-1.7b")
        assert pytest.approx(0.516, abs=1e-3) == NF4_BYTES
        assert weights_bytes(shape, True) == pytest.approx(
            0.516 * shape.matrices + 4 * (shape.parameters - shape.matrices), rel=1e-3
        )

    def test_one_chunk_of_logits_and_two_of_their_type_under_autocast(self):
        """256 x 151,936 in fp32 are 148 MiB; autocast holds the narrow ones too, 222."""
        lora = LoraConfig(rank=16)
        for narrow, expected in ((4, 148), (2, 223)):
            case = step_of(lora=lora, recompute=True, narrow=narrow)
            moments = training_peak(case, 0)
            logits = (
                training_peak(case, 0).moments["loss"]
                - training_peak(step_of(lora=lora, recompute=True, narrow=narrow, chunk=0), 0).moments["loss"]
            )
            assert logits / MIB == pytest.approx(expected, abs=1) and moments.total >= logits

    @pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.name)
    def test_no_switch_takes_more(self, switch):
        start = step_of("smollm2-135m", 512, batch=4, lora=LoraConfig() if "nf4" in switch.name else None)
        changed = switch.on(start)
        assert changed is not None and training_peak(changed, 0).total <= training_peak(start, 0).total
        assert switch.on(changed) is None or "halved" in switch.name

    def test_length_and_batch_take_more(self):
        peaks = [
            training_peak(step_of(length=length, batch=batch), 0).total
            for length, batch in ((512, 1), (512, 2), (1024, 2))
        ]
        assert peaks[0] < peaks[1] < peaks[2]

    def test_what_fits_into_8_gb_comes_out_as_tabled(self):
        """At 2,048 fed tokens with recomputation and fused attention (ours materialises its scores):
        what fits and what does not must come out the same."""
        rank16, framework, budget = LoraConfig(rank=16), PASCAL.framework, int(0.9 * 8 * 2**30)
        cases = {
            ("qwen3-0.6b", "full"): step_of(recompute=True),
            ("qwen3-0.6b", "full 8-bit"): step_of(recompute=True, eight_bit=True),
            ("qwen3-0.6b", "lora"): step_of(lora=rank16, recompute=True),
            ("qwen3-0.6b", "qlora"): step_of(lora=rank16, packed=True, recompute=True),
            ("qwen3-1.7b", "full 8-bit"): step_of("qwen3-1.7b", recompute=True, eight_bit=True),
            ("qwen3-1.7b", "lora"): step_of("qwen3-1.7b", lora=rank16, recompute=True),
            ("qwen3-1.7b", "qlora"): step_of("qwen3-1.7b", lora=rank16, packed=True, recompute=True),
        }
        fits = {name: training_peak(case, framework).total <= budget for name, case in cases.items()}
        assert fits == {
            ("qwen3-0.6b", "full"): False, ("qwen3-0.6b", "full 8-bit"): True, ("qwen3-0.6b", "lora"): True,
            ("qwen3-0.6b", "qlora"): True, ("qwen3-1.7b", "full 8-bit"): False, ("qwen3-1.7b", "lora"): False,
            ("qwen3-1.7b", "qlora"): True,
        }  # fmt: skip

    def test_the_cache_by_hand(self):
        """2 x 28 layers x 8 heads x 128 x (2048 + 1) places x 2 bytes."""
        shape = find_architecture("qwen3-0.6b")
        peak = serving_peak(Serving(shape, 1, 2048, 32, 2), 0)
        assert peak.parts["cache"] - 2 * 28 * 8 * 128 * 2049 * 2 == 65 * 1024 * 2  # the hidden states between blocks

    def test_the_longest_document_is_the_longest_that_fits(self):
        case = Serving(find_architecture("qwen3-0.6b"), 1, 2048, 32, 4)
        budget = 4 * 2**30
        longest = longest_context(case, 0, budget)
        assert serving_peak(Serving(case.shape, 1, longest, 32, 4), 0).total <= budget
        assert serving_peak(Serving(case.shape, 1, longest + 32, 32, 4), 0).total > budget


CONVERT = {"parent": "qwen3-0.6b", "wsd": [{"phase": "warmup", "block_size": b, "tokens": 9} for b in (1, 8, 32)]}
ROWS = {"sequence_length": 512, "pad_to_block": 32}


def question(machine: str = "pascal", rows: dict[str, Any] | None = None, **changes: Any) -> Question:
    return convert_question({**CONVERT, **changes}, rows if rows is not None else ROWS, find_machine(machine))


class TestSections:
    def test_block_sizes_are_fed_as_the_objective_feeds_them(self):
        feeds = {case.feed.block: case.feed for case in question(alignment="parent").cases}
        assert (feeds[1].noisy, feeds[1].clean, feeds[1].by_blocks) == (0, 512, False)
        assert (feeds[32].noisy, feeds[32].clean, feeds[32].by_blocks) == (512, 512, True)
        single = question(
            wsd=[{"phase": "stable", "block_size": 512, "tokens": 9}], block_size=32, rows={**ROWS, "pad_to_block": 512}
        )
        assert (single.cases[0].feed.noisy, single.cases[0].feed.clean) == (512, 0)

    def test_the_defaults_compare_with_a_second_copy_and_adapters_with_none(self):
        assert {case.teacher for case in question().cases} == {"copy"}
        assert {case.teacher for case in question(lora={"rank": 4}).cases} == {"own"}
        assert {case.teacher for case in question(losses=[{"name": "m2t"}]).cases} == {"none"}
        whole, own = (worst_peak(question(**more), 0).parts["teacher"] for more in ({}, {"lora": {"rank": 4}}))
        assert whole > 2e9 > own

    @pytest.mark.parametrize(
        ("start", "teacher"),
        [
            ({"parent": {"name": "qwen3-0.6b", "alignment": "parent", "block_size": 8}}, "own"),
            (
                {"parent": {"name": "qwen3-0.6b", "alignment": "parent", "block_size": 8}, "teacher": "qwen3-0.6b"},
                "copy",
            ),
            ({"model": "tiny"}, "copy"),
        ],
    )
    def test_adapters_of_a_fine_tuning_share_the_parent_only_where_they_lie_on_it(
        self, start: dict[str, Any], teacher: str
    ):
        """As `sft` does: under the adapters of a converted checkpoint lies the checkpoint, not its parent."""
        section, chat = {**start, "losses": [{"name": "m2t"}, {"name": "kl"}]}, {"train": {"name": "arithmetic"}}
        adapted = sft_question({**section, "lora": {"rank": 4}}, chat, PASCAL)
        assert adapted.cases[0].teacher == teacher
        switch = next(switch for switch in SWITCHES if switch.name.startswith("lora="))
        switched_on = switched(sft_question(section, chat, PASCAL), [switch])
        assert switched_on is not None and switched_on.cases[0].teacher == teacher

    @pytest.mark.parametrize(
        ("machine", "precision", "narrow"),
        [("pascal", "auto", 4), ("ampere", "auto", 2), ("pascal", "bf16", 2), ("ampere", "no", 4)],
    )
    def test_the_compute_type_is_the_loop_s(self, machine: str, precision: str, narrow: int):
        assert question(machine, train={"precision": precision}).cases[0].how.narrow == narrow

    def test_switches_are_read_from_the_section(self):
        train = {
            "gradient_checkpointing": True,
            "optimizer": "adamw8bit",
            "offload": "optimizer",
            "accumulate": 2,
            "chunk": 64,
        }
        case = question(train={**train, "max_vram_fraction": 0.8}, lora={"rank": 4}, quantize="nf4").cases[0]
        assert case.recompute and case.eight_bit and case.resting and case.several and case.how.packed
        assert case.chunk == 64 and question(train={"max_vram_fraction": 0.8}).limit == 0.8

    def test_sections_that_convert_would_refuse_are_refused(self):
        with pytest.raises(ConfigError, match="without lora"):
            question(quantize="nf4")
        with pytest.raises(ConfigError, match="batchsize"):
            question(train={"batchsize": 2})

    def test_answers_shorten_what_a_fine_tuning_feeds(self):
        section, chat = {"model": "tiny"}, {"train": {"name": "arithmetic"}, "sequence_length": 128}
        whole = sft_question(section, chat, PASCAL)
        half = sft_question(section, chat, PASCAL, answers=0.5)
        assert whole.cases[0].feed.noisy == 128 and half.cases[0].feed.noisy == 64
        assert worst_peak(half, 0).total < worst_peak(whole, 0).total
        assert whole.block_size == 8  # of the checkpoint's card

    def test_a_checkpoint_that_is_not_there_needs_a_model(self):
        chat = {"train": {"name": "arithmetic"}}
        with pytest.raises(ConfigError, match="--model"):
            sft_question({"model": "runs/later/checkpoint"}, chat, PASCAL)
        parsed = sft_question({"model": "runs/later/checkpoint"}, chat, PASCAL, "qwen3-0.6b")
        assert parsed.cases[0].shape.layers == 28


class TestAdvice:
    def test_what_fits_needs_nothing(self):
        plan = make_plan(question(lora={"rank": 4}, train={"gradient_checkpointing": True}), PASCAL, 8 * 2**30)
        assert plan.fits and plan.advised == () and verdict(plan).startswith("fits")

    def test_the_cheapest_set_that_fits_is_named(self):
        asked = question()
        plan = make_plan(asked, PASCAL, 8 * 2**30)
        assert not plan.fits and plan.advised and plan.advised_peak.total <= plan.budget
        chosen = [switch for switch in SWITCHES if switch.name in plan.advised]
        assert worst_peak(switched(asked, chosen), PASCAL.framework).total == plan.advised_peak.total
        cheaper = [s for s in chosen[:-1]]
        assert worst_peak(switched(asked, cheaper), PASCAL.framework).total > plan.budget if cheaper else True

    def test_a_smaller_card_asks_for_more(self):
        advised = [advice(question(), PASCAL.framework, size * 2**30) for size in (16, 4, 2)]
        costs = [sum(switch.cost for switch in switches) for switches, _ in advised]
        assert costs == sorted(costs) and costs[0] < costs[-1]

    def test_where_nothing_helps_that_is_said(self):
        plan = make_plan(question(), PASCAL, 600 * MIB)
        assert plan.advised is None and "smaller model" in verdict(plan)

    def test_decoding_tells_the_longest_document(self):
        asked = serving_question(find_architecture("qwen3-1.7b"), PASCAL, 1, 4096, 32)
        plan = make_plan(asked, PASCAL, 8 * 2**30)
        assert not plan.fits and "--dtype fp16" in verdict(plan) and plan.halved < plan.budget


@pytest.mark.parametrize("text", ["8GiB", "8192MiB", "8192 mib", "8589934592"])
def test_amounts_of_memory_are_read(text: str):
    assert read_bytes(text) == 8 * 2**30 and show_bytes(8 * 2**30) == "8,192 MiB"


@pytest.mark.parametrize("text", ["eight", "8 gigs", "", "-1GiB", "0"])
def test_other_amounts_are_refused(text: str):
    with pytest.raises(ConfigError, match="no amount of memory"):
        read_bytes(text)


HERE = (
    # what is here, its memory, the computer's, what is asked: what is planned for
    ("cpu", 16, [], ("cpu", 16, True)),
    ("cpu-bf16", 16, [], ("cpu-bf16", 16, True)),
    ("ampere", 24, [], ("ampere", 24, False)),
    ("cpu", 16, ["--vram", "6GiB"], ("pascal", 6, False)),
    ("cpu", 16, ["--machine", "ampere"], ("ampere", 8, False)),
    ("cpu", 16, ["--machine", "cpu-bf16"], ("cpu-bf16", 32, False)),
    ("ampere", 24, ["--vram", "6GiB"], ("ampere", 6, False)),
    ("ampere", 24, ["--machine", "ampere"], ("ampere", 24, False)),
    ("ampere", 24, ["--machine", "pascal"], ("pascal", 8, False)),
    ("ampere", 24, ["--machine", "cpu"], ("cpu", 32, False)),
)


class TestVerb:
    @pytest.mark.parametrize(("here", "size", "flags", "planned"), HERE)
    def test_what_is_not_said_is_this_machine_s(self, here, size, flags, planned, capsys, monkeypatch):
        monkeypatch.setattr(memory_plan_machine, "this_machine", lambda: (MACHINES[here], size * 2**30))
        monkeypatch.setattr(memory_plan_machine, "total_memory", lambda device: 32 * 2**30)
        assert main(["plan", "--model", "tiny", "--json", *flags]) == 0
        told = json.loads(capsys.readouterr().out)
        beside = told.get("beside")
        assert (told["machine"]["name"], told["memory"] / 2**30, beside is not None) == planned
        if beside is not None:
            assert (beside["machine"]["name"], beside["memory"]) == ("pascal", 8 * 2**30)
            assert beside["stages"][0]["peak"] != told["stages"][0]["peak"]

    def test_this_machine_is_the_one_that_torch_would_use(self):
        machine, size = memory_plan_machine.this_machine()
        device = choose_device("auto")
        assert machine.on_cpu is (device.type != "cuda") and machine.bf16 is accelerates_bf16(device)
        assert size == total_memory(device) > 2**30

    def test_without_a_gpu_the_card_of_8_gib_stands_beside_and_decides_nothing(self, capsys, monkeypatch):
        monkeypatch.setattr(memory_plan_machine, "this_machine", lambda: (MACHINES["cpu"], 64 * 2**30))
        assert main(["plan", "--model", "qwen3-0.6b"]) == 0
        shown = capsys.readouterr().out
        assert shown.index("for a CPU without bf16; 64.0 GiB") < shown.index("for a GPU without bf16")
        assert "convert: fits" in shown and "convert: does not fit" in shown
        assert max(map(len, shown.splitlines())) > 140, "piped lines are not wrapped"

    def test_a_run_is_planned_stage_by_stage(self, capsys):
        assert main(["plan", str(CONFIGS / "default.json"), "--vram", "8GiB"]) == 0
        shown = capsys.readouterr().out
        assert all(word in shown for word in ("weights", "convert: fits", "generate: fits", "assumed"))

    def test_what_does_not_fit_is_exit_code_1_and_says_what_would(self, capsys):
        assert main(["plan", "--model", "qwen3-0.6b", "--vram", "8GiB"]) == 1
        shown = capsys.readouterr().out
        assert "does not fit" in shown and "train.gradient_checkpointing=true" in shown

    def test_json_and_pictures(self, capsys, tmp_path: Path):
        code = main(
            ["plan", "--model", "tiny", "--out", str(tmp_path), "--json", "--machine", "cpu-bf16", "--vram", "2GiB"]
        )
        printed = json.loads(capsys.readouterr().out)
        assert code == 0 and printed == read_json(tmp_path / "plan.json")
        assert [stage["stage"] for stage in printed["stages"]] == ["convert", "generate"]
        assert sum(printed["stages"][0]["parts"].values()) == printed["stages"][0]["peak"]
        assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")

    def test_a_run_of_two_stages_plans_the_second_on_the_first_one_s_model(self, capsys):
        assert main(["plan", str(CONFIGS / "qwen3-0.6b-8gb.json"), "--json", "--vram", "8GiB"]) == 0
        stages = json.loads(capsys.readouterr().out)["stages"]
        assert [stage["stage"] for stage in stages] == ["convert", "sft", "rl", "generate"]
        assert {stage["model"] for stage in stages} == {"qwen3-0.6b"}

    @pytest.mark.parametrize(
        ("change", "parent"),
        [({}, "tiny"), ({"serve": {"parent": "qwen3-0.6b"}}, "qwen3-0.6b"), ({"generate": {"parent": ""}}, None)],
    )
    def test_a_parent_that_writes_beside_counts_too(self, capsys, tmp_path: Path, change, parent):
        run = read_json(CONFIGS / "tiny.json") | {"parent": "tiny", "stages": [{"stage": "convert"}]}
        run = {key: value for key, value in run.items() if key not in ("serve", "generate")}
        peaks = {}
        for name, more in (
            ("alone", {}),
            ("beside", {"stages": [{"stage": "convert"}, {"stage": "generate"}], **change}),
        ):
            (tmp_path / "run.json").write_text(json.dumps(run | more))
            assert main(["plan", str(tmp_path / "run.json"), "--json", "--machine", "cpu", "--vram", "64GiB"]) == 0
            peaks[name] = json.loads(capsys.readouterr().out)["stages"][-1]
        more = 0 if parent is None else weights_bytes(find_architecture(parent), False)
        assert peaks["beside"]["parts"]["weights"] - peaks["alone"]["parts"]["weights"] == more
        assert (peaks["beside"]["parts"]["cache"] > peaks["alone"]["parts"]["cache"]) is (parent is not None)
        assert any("beside it" in words for words in peaks["beside"]["assumes"]) is (parent is not None)

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ([], "nothing to plan"),
            (["--model", "qwen3-0.6b", "--machine", "voodoo"], "unknown machine 'voodoo'"),
            (["--model", "qwen3-0.6b", "--vram", "much"], "no amount of memory"),
            (["--model", "nothing-like-it"], "no model"),
            (["--model", "tiny", "--context", "0"], "give 1 or more"),
        ],
    )
    def test_mistakes_are_one_line_and_exit_code_2(self, capsys, arguments: list[str], said: str):
        assert main(["plan", *arguments]) == 2
        message = capsys.readouterr().err
        assert said in message and "Traceback" not in message and message.count("\n") == 1

    @pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
    def test_every_configuration_of_the_repository_can_be_planned(self, capsys, path: Path):
        """`--model` stands in for checkpoints that an earlier run would have made."""
        assert main(["plan", str(path), "--json", "--vram", "64GiB", "--model", "smollm2-135m"]) == 0
        assert json.loads(capsys.readouterr().out)["stages"]


def test_the_architecture_is_a_value():
    assert isinstance(find_architecture("tiny"), Architecture) and find_architecture("tiny") == find_architecture(
        "tiny"
    )
