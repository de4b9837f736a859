"""What a process may use of the machine it runs on."""

import sys
from pathlib import Path

import pytest
import torch

from hildanext.core import runtime
from hildanext.core.runtime import container_limits, total_memory


@pytest.fixture
def groups(tmp_path: Path) -> Path:
    """Control groups: 8 GiB for the service, none of its own for the job in it, 64 GiB beside them."""
    job = tmp_path / "cgroup" / "service" / "job"
    job.mkdir(parents=True)
    (job / "memory.max").write_text("max\n")
    (job.parent / "memory.max").write_text(f"{8 * 2**30}\n")
    (tmp_path / "memory.max").write_text("1\n")
    (tmp_path / "own").write_text("3:cpu:/elsewhere\n0::/service/job\n")
    return tmp_path


def test_the_limit_of_any_group_around_the_process_counts(groups: Path) -> None:
    assert container_limits(groups / "cgroup", groups / "own") == [8 * 2**30], "nothing outside the groups' own folder"


def test_where_nothing_is_limited_everything_may_be_used(tmp_path: Path) -> None:
    assert container_limits(tmp_path, tmp_path / "own") == [sys.maxsize]


def test_the_memory_of_a_cpu_is_no_more_than_its_container_has(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = total_memory(torch.device("cpu"))
    monkeypatch.setattr(runtime, "container_limits", lambda: [whole - 1, whole // 2])
    assert total_memory(torch.device("cpu")) == whole // 2
    assert runtime.available_memory(torch.device("cpu")) <= whole // 2
