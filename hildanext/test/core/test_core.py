"""errors, choice, config, log, runfolder, runtime: the ground everything stands on."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import Field

from hildanext.core import run_dir as runfolder
from hildanext.core.config import config, merge, override, plain, read_json, validate
from hildanext.core.errors import CheckpointError, ConfigError, HildaError, UnknownChoice
from hildanext.core.logging_setup import configure_logging
from hildanext.core.metrics_log import MetricLog, read_metrics
from hildanext.core.registry import build
from hildanext.core.runtime import (
    capability_is_covered,
    choose_device,
    choose_dtype,
    machine,
    seed_everything,
    set_threads,
)


@config
class Soup:
    salt: float = Field(default=0.5, ge=0.0)
    portions: int = 2


TABLE = {"soup": Soup}


class TestErrors:
    def test_an_error_says_what_happened_then_what_to_do(self):
        assert str(HildaError("no such file", "check the path")) == "no such file: check the path"

    def test_an_unknown_choice_guesses_what_was_meant(self):
        text = str(UnknownChoice("decoder", "treshold_edit", ["threshold_edit", "other"]))
        assert text == "unknown decoder 'treshold_edit': did you mean 'threshold_edit'? choices: other, threshold_edit"


class TestChoice:
    def test_makes_a_member_with_its_knobs(self):
        assert build("dish", TABLE, {"name": "soup", "portions": 3}) == Soup(portions=3)

    def test_refuses_a_name_outside_the_table(self):
        with pytest.raises(UnknownChoice, match="did you mean 'soup'"):
            build("dish", TABLE, {"name": "soop"})

    def test_refuses_a_section_without_a_name(self):
        with pytest.raises(ConfigError, match="dish has no name"):
            build("dish", TABLE, {"salt": 1.0})


class TestConfig:
    def test_a_misspelt_knob_is_refused_with_a_guess(self):
        with pytest.raises(ConfigError, match="unknown key 'sal', did you mean 'salt'"):
            validate(Soup, {"sal": 1.0}, "soup")

    def test_all_mistakes_are_told_at_once(self):
        with pytest.raises(ConfigError) as caught:
            validate(Soup, {"salt": -1.0, "portions": "many", "spoon": 1}, "soup")
        assert all(name in str(caught.value) for name in ("salt", "portions", "spoon"))

    def test_knobs_are_frozen(self):
        with pytest.raises((AttributeError, TypeError)):
            Soup().salt = 1.0

    def test_the_section_of_an_object_builds_it_again(self):
        assert validate(Soup, plain(Soup(salt=0.25)), "soup") == Soup(salt=0.25)

    @pytest.mark.parametrize(
        "text, word",
        [
            ("[" * 100_000, "cannot read"),
            ('{"a":' * 120 + "1" + "}" * 120, "nested"),
            ('{"a": ' + "9" * 5000 + "}", "cannot read"),
            ('{"seed": 1, "seed": 2}', "a key twice in one object"),
        ],
        ids=["endless", "deep", "digits", "twice"],
    )
    def test_json_that_means_trouble_is_one_line(self, text, word, tmp_path):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ConfigError, match=word):
            read_json(tmp_path / "run.json")

    def test_a_byte_order_mark_is_no_part_of_a_file(self, tmp_path):
        (tmp_path / "run.json").write_bytes(b'\xef\xbb\xbf{"seed": 1}')
        assert read_json(tmp_path / "run.json") == {"seed": 1}

    @pytest.mark.parametrize(
        "assignment, word",
        [("a=NaN", "NaN or infinity"), ("a=-Infinity", "NaN or infinity"), (".".join("a" * 150) + "=1", "deep")],
    )
    def test_an_assignment_that_json_does_not_know_is_refused(self, assignment, word):
        with pytest.raises(ConfigError, match=word):
            override({}, [assignment])
        assert override({}, ["a=" + "[" * 100_000])["a"].startswith("[[[")

    def test_overrides_read_json_and_fall_back_to_text(self):
        run = override({"a": {"b": 1}}, ["a.b=2", "a.c=word", "d.e.f=[1,2]", "x=null"])
        assert run == {"a": {"b": 2, "c": "word"}, "d": {"e": {"f": [1, 2]}}, "x": None}

    @pytest.mark.parametrize("assignment", ["nothing", "=1", "a.b.c=1"])
    def test_an_override_that_makes_no_sense_is_refused(self, assignment):
        with pytest.raises(ConfigError, match="--set"):
            override({"a": {"b": 1}}, [assignment])

    def test_merging_leaves_the_defaults_as_they_were(self):
        below = {"a": {"x": 1, "y": 2}, "list": [1]}
        assert merge(below, {"a": {"y": 3}}) == {"a": {"x": 1, "y": 3}, "list": [1]}
        assert below == {"a": {"x": 1, "y": 2}, "list": [1]}

    def test_another_member_replaces_the_default_one_whole(self):
        assert merge({"d": {"name": "soup", "salt": 1}}, {"d": {"name": "tea"}}) == {"d": {"name": "tea"}}
        assert merge({"d": {"name": "soup", "salt": 1}}, {"d": {"x": 2}}) == {"d": {"name": "soup", "salt": 1, "x": 2}}

    @pytest.mark.parametrize(
        "content, word", [(b'{"a": ', "line 1"), (b"[1]", "list"), (b"\xff\xfe\x00", "cannot read")]
    )
    def test_a_file_that_is_no_run_is_refused(self, tmp_path, content, word):
        path = tmp_path / "run.json"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=word):
            read_json(path)


class TestMetricLog:
    def test_what_is_written_is_read(self, tmp_path):
        with MetricLog(tmp_path / "metrics.jsonl") as log:
            log.write(step=1, loss=torch.tensor(0.5))
            log.write(step=2, loss=0.25)
        assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]

    def test_what_is_no_number_is_null(self, tmp_path):
        """Every line is JSON for any reader: NaN is none."""
        with MetricLog(tmp_path / "m") as log:
            log.write(step=1, bound_se=float("nan"), by_t={0: torch.tensor(float("inf"))}, kept=[1.0, float("nan")])
        line = json.loads((tmp_path / "m").read_text(), parse_constant=pytest.fail)
        assert line == {"step": 1, "bound_se": None, "by_t": {"0": None}, "kept": [1.0, None]}

    def test_a_resumed_run_drops_the_lines_after_its_checkpoint(self, tmp_path):
        with MetricLog(tmp_path / "m") as log:
            for step in range(5):
                log.write(step=step)
            log.truncate_after(2)
            log.write(step=3, again=True)
        assert [line["step"] for line in read_metrics(tmp_path / "m")] == [0, 1, 2, 3]
        assert read_metrics(tmp_path / "m")[-1]["again"]

    def test_a_half_written_line_is_dropped_on_opening(self, tmp_path):
        (tmp_path / "m").write_bytes(b'{"step": 1}\n{"step": 2, "lo')
        assert read_metrics(tmp_path / "m") == [{"step": 1}]
        with MetricLog(tmp_path / "m") as log:
            log.write(step=2)
        assert read_metrics(tmp_path / "m") == [{"step": 1}, {"step": 2}]

    def test_a_missing_file_has_no_lines(self, tmp_path):
        assert read_metrics(tmp_path / "nothing") == []

    def test_an_unknown_level_is_refused(self):
        with pytest.raises(ConfigError, match="unknown log level"):
            configure_logging("loud")


class TestRunFolder:
    def test_run_json_holds_config_seed_profile_and_methods(self, tmp_path):
        folder = runfolder.open_run(
            tmp_path / "r", {"profile": "FULL", "x": 1}, 7, {"full": ["rcd"], "data": {"a": "ff"}}
        )
        record = json.loads((folder / "run.json").read_text())
        assert record["config"] == {"profile": "FULL", "x": 1} and record["seed"] == 7
        assert record["profile"] == "FULL" and record["full"] == ["rcd"] and record["data"] == {"a": "ff"}

    def test_writing_leaves_no_temporary_file(self, tmp_path):
        runfolder.write_atomically(tmp_path / "a" / "b", "text")
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]

    def test_a_full_disk_is_one_error_and_keeps_the_old_file(self, tmp_path, monkeypatch):
        target = tmp_path / "file"
        runfolder.write_atomically(target, "old")

        def full(handle: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="out of disk.*free 3 bytes"):
            runfolder.write_atomically(target, "new")
        assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]

    def test_a_full_disk_keeps_the_old_folder(self, tmp_path):
        target = tmp_path / "model"
        runfolder.save_folder_atomically(target, lambda folder: _fill(folder, "old"))

        def fails(folder: Path) -> None:
            _fill(folder, "half")
            raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.raises(CheckpointError, match="out of disk"):
            runfolder.save_folder_atomically(target, fails)
        assert (target / "weights").read_text() == "old" and list(tmp_path.iterdir()) == [target]

    def test_a_folder_is_replaced_whole(self, tmp_path):
        target = tmp_path / "model"
        runfolder.save_folder_atomically(target, lambda folder: _fill(folder, "old", "extra"))
        runfolder.save_folder_atomically(target, lambda folder: _fill(folder, "new"))
        assert [path.name for path in target.iterdir()] == ["weights"]
        assert (target / "weights").read_text() == "new" and list(tmp_path.iterdir()) == [target]

    def test_a_kill_between_the_renames_is_put_right(self, tmp_path):
        target = tmp_path / "model"
        (tmp_path / "model.old").mkdir()
        dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
        (tmp_path / f"model.tmp-{dead.stdout.strip()}").mkdir()
        runfolder.recover_folder(target)
        assert list(tmp_path.iterdir()) == [target]

    @pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
    def test_a_folder_we_may_not_write_is_one_error(self, tmp_path):
        tmp_path.chmod(0o500)
        with pytest.raises(CheckpointError, match="cannot write"):
            runfolder.write_atomically(tmp_path / "file", "text")

    def test_a_file_in_the_place_of_a_folder_is_one_error(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match="cannot write"):
            runfolder.write_atomically(tmp_path / "file" / "inside", "text")


def _fill(folder: Path, text: str, *more: str) -> None:
    for name in ("weights", *more):
        (folder / name).write_text(text)


class TestRuntime:
    def test_pascal_is_not_covered_by_builds_that_dropped_it(self):
        assert capability_is_covered(6, 1, ["sm_50", "sm_60", "sm_70", "sm_90"])
        assert not capability_is_covered(6, 1, ["sm_75", "sm_80", "sm_90", "compute_90"])
        assert capability_is_covered(12, 0, ["sm_80", "compute_90"])
        assert not capability_is_covered(7, 0, ["sm_75"])

    def test_a_device_that_is_not_there_is_refused(self):
        with pytest.raises(ConfigError, match="unknown device"):
            choose_device("toaster")
        if not torch.cuda.is_available():
            with pytest.raises(ConfigError, match="not there"):
                choose_device("cuda:0")

    def test_an_unknown_dtype_is_refused(self):
        with pytest.raises(UnknownChoice, match="did you mean 'bf16'"):
            choose_dtype("bf61", torch.device("cpu"))

    @pytest.mark.parametrize("flags, dtype", [({"avx2"}, torch.float32), ({"avx512_bf16"}, torch.bfloat16)])
    def test_a_cpu_gets_bf16_only_where_it_computes_in_it(self, monkeypatch, flags, dtype):
        monkeypatch.setattr("hildanext.core.runtime.cpu_flags", lambda: frozenset(flags))
        assert choose_dtype("auto", torch.device("cpu")) == dtype

    def test_threads_are_set_and_told(self):
        before = torch.get_num_threads()
        try:
            assert set_threads(1) == 1 == torch.get_num_threads()
            for wrong in (0, 100_000):
                with pytest.raises(ConfigError, match=rf"threads = {wrong}: give 1 to \d+ on this machine"):
                    set_threads(wrong)
        finally:
            torch.set_num_threads(before)

    def test_the_same_seed_gives_the_same_numbers(self):
        state = torch.random.get_rng_state()
        try:
            seed_everything(3)
            first = torch.rand(4)
            seed_everything(3)
            assert torch.equal(first, torch.rand(4))
        finally:
            torch.random.set_rng_state(state)

    def test_the_machine_is_json(self):
        record = json.loads(json.dumps(machine(torch.device("cpu"), torch.float32)))
        assert record["device"] == "cpu" and record["dtype"] == "float32" and record["versions"]["torch"]


def test_a_program_does_not_hear_of_kernels_that_a_library_misses(caplog):
    import logging

    from hildanext.core.logging_setup import quieten_libraries

    quieten_libraries()
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward")
    assert not caplog.records


def test_the_log_follows_a_replaced_standard_error(monkeypatch):
    import io
    import logging

    from hildanext.core.logging_setup import configure_logging

    first, second = io.StringIO(), io.StringIO()
    logger = logging.getLogger("hildanext")
    before = (logger.handlers[:], logger.level, logger.propagate)
    monkeypatch.setattr("sys.stderr", first)
    configure_logging()
    monkeypatch.setattr("sys.stderr", second)
    first.close()
    logger.warning("heard")
    logger.handlers[:], logger.level, logger.propagate = before
    assert "heard" in second.getvalue()


def test_the_log_writes_to_what_pytest_captures(capsys):
    import logging

    from hildanext.core.logging_setup import configure_logging

    logger = logging.getLogger("hildanext")
    before = (logger.handlers[:], logger.level, logger.propagate)
    configure_logging()
    logger.warning("heard")
    logger.handlers[:], logger.level, logger.propagate = before
    assert capsys.readouterr().err == "WARNING hildanext: heard\n"
