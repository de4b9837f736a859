"""What the runtime `auto` is: never other weights, never unasked for large models, and what was faster here."""

from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

import hildanext.runtimes.choice as choice
from hildanext.core.runtime import RuntimeConfig
from hildanext.facade import load_model
from hildanext.runtimes.choice import faster_runtime
from small_models import small_parent


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, float]:
    """Seconds by runtime, as a measurement finds them; a cache of its own, and models of any size are looked at."""
    times = {"torch": 0.02, "onnx": 0.01, "measured": 0}

    def seconds(network: object) -> float:
        times["measured"] += 1
        return times["torch" if isinstance(network, choice.TorchNetwork) else "onnx"]

    monkeypatch.setattr(choice, "seconds_of_one_row", seconds)
    monkeypatch.setattr(choice, "SMALLEST", 0)
    monkeypatch.setenv("HILDANEXT_HOME", str(tmp_path / "cache"))
    return times


def test_the_faster_one_is_taken_in_fp32_and_measured_once(
    timed: dict[str, float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = str(small_parent(tmp_path / "parent"))
    asked = RuntimeConfig(dtype="fp32", threads=1)
    with caplog.at_level("WARNING", "hildanext"):
        chosen = faster_runtime(name, asked)
    assert (chosen.runtime, chosen.dtype, chosen.threads) == ("onnx", "fp32", 1)
    assert "10.0 ms in ONNX Runtime (fp32) and 20.0 in torch (float32): auto is onnx from now on" in caplog.text
    timed["onnx"] = 1.0
    assert faster_runtime(name, asked) == chosen and timed["measured"] == 2, "what was measured is kept"
    other = str(small_parent(tmp_path / "other", "qwen2"))
    assert faster_runtime(other, asked) == asked
    model = load_model(name, dtype="fp32", threads=1, mode="exact")
    assert model.summary()["runtime"] == "onnx"


@pytest.mark.parametrize(
    "asked",
    [
        RuntimeConfig(runtime="torch"),
        RuntimeConfig(dtype="bf16"),
        RuntimeConfig(dtype="q8"),
        RuntimeConfig(runtime="onnx"),
        RuntimeConfig(device="cuda"),
    ],
)
def test_who_says_something_gets_it(timed: dict[str, float], tmp_path: Path, asked: RuntimeConfig) -> None:
    assert faster_runtime(str(small_parent(tmp_path / "parent")), asked) is asked and not timed["measured"]


@pytest.mark.parametrize("why", ["small", "large", "missing"])
def test_where_it_cannot_pay_or_is_not_installed_torch_stays(
    timed: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "small":
        monkeypatch.setattr(choice, "SMALLEST", 1 << 40)
    elif why == "large":
        monkeypatch.setattr(choice, "LARGEST", 1)
    else:
        monkeypatch.setattr(choice, "_installed", lambda: False)
    asked = RuntimeConfig()
    assert faster_runtime(str(small_parent(tmp_path / "parent")), asked) is asked and not timed["measured"]
