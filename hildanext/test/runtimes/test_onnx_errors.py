"""What cannot be run in ONNX Runtime is said in one line, with what to do about it."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hildanext import generate, load
from hildanext.cli import main
from hildanext.core.errors import CheckpointError, ConfigError, UnknownChoice
from hildanext.core.runtime import RuntimeConfig
from hildanext.export.onnx_card import read_onnx_card
from hildanext.models.card import read_card
from hildanext.runtimes import onnx_open
from hildanext.runtimes.onnx_session import load_onnxruntime
from training_fixtures import small_checkpoint


def without(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """Import `module` in place of onnxruntime; None: there is none."""
    real = importlib.import_module

    def load(name: str, *more: Any) -> Any:
        if name != "onnxruntime":
            return real(name, *more)
        if module is None:
            raise ImportError(name)
        return module

    monkeypatch.setattr(importlib, "import_module", load)


def test_where_it_is_not_installed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, None)
    with pytest.raises(ConfigError, match=r"needs onnxruntime") as caught:
        load_onnxruntime()
    assert "hildanext[onnx]" in caught.value.line()


def test_a_version_without_8_bits_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, SimpleNamespace(__version__="1.21.1"))
    with pytest.raises(ConfigError, match=r"1\.21\.1 has no 8-bit"):
        load_onnxruntime()


def test_dtypes_runtimes_and_devices_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnknownChoice, match="runtime"):
        RuntimeConfig(runtime="onxx").resolve()
    with pytest.raises(ConfigError, match="q4 is for writing text alone"):
        RuntimeConfig(dtype="q4").resolve()
    assert main(["bench", "decode", "--model", "tiny", "--runtime", "onnx"]) == 2
    assert "'onnx' is for writing text alone" in capsys.readouterr().err
    assert main(["export", "tiny", "--format", "gguf", "--out", "nowhere"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_open_export_is_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx", reason="the extra onnx is not installed")
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    from onnx_exports import small_network, small_source

    folder = tmp_path / "out"
    small_network(folder, small_source(), "q4")
    opened = onnx_open.open_onnx(str(folder), RuntimeConfig())
    assert opened.network.places == 3 and opened.card.dtype == "q4"
    with pytest.raises(ConfigError, match="exported in q4, not q8"):
        onnx_open.open_onnx(str(folder), RuntimeConfig(dtype="q8"))
    with pytest.raises(ConfigError, match="runs on the CPU"):
        onnx_open.open_onnx(str(folder), RuntimeConfig(device="cuda"))
    with pytest.raises(UnknownChoice, match="bf16"):
        onnx_open.open_onnx("tiny", RuntimeConfig(dtype="bf16", runtime="onnx"))
    strange = _strange_graph()
    (folder / "head.onnx").write_bytes(strange)
    with pytest.raises(CheckpointError, match="no graph of this package"):
        onnx_open.open_onnx(str(folder), RuntimeConfig())
    (folder / "head.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match="cannot be run"):
        onnx_open.open_onnx(str(folder), RuntimeConfig())
    card = json.loads((folder / "hilda.json").read_text())
    (folder / "hilda.json").write_text(json.dumps({**card, "export_version": 0}))
    with pytest.raises(CheckpointError, match="no export that this version reads"):
        onnx_open.open_onnx(str(folder), RuntimeConfig())


def test_a_checkpoint_is_exported_and_written_with_where_text_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command and in Python, its card kept; other modes and other verbs say in one line why not."""
    pytest.importorskip("onnx", reason="the extra onnx is not installed")
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    monkeypatch.setenv("HILDANEXT_HOME", str(tmp_path / "home"))
    checkpoint, out, drafts = small_checkpoint(tmp_path / "model"), tmp_path / "out", tmp_path / "drafts"
    assert main(["export", str(checkpoint), "--dtype", "q8", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"{checkpoint} in q8, block 8" in said and "KL" in said
    assert read_onnx_card(out).diffusion == read_card(checkpoint)
    asked = ["--prompt", "Once upon a time", "--max-new-tokens", "12", "--mode", "Q_MODE", "--json"]
    assert main(["generate", "--model", str(out), *asked]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["dtype"] == "q8" and first["runtime"] == "onnx" and "KL" in first["from_fp32"]
    assert main(["generate", "--model", str(checkpoint), "--runtime", "onnx", *asked]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == first["tokens"]
    for model in (load(str(out)), load(str(checkpoint), dtype="q8")):
        written = generate(model, "Once upon a time", "Q_MODE", max_new_tokens=12)
        assert list(written.tokens) == first["tokens"]
    from onnx_exports import small_network, small_source

    small_network(drafts, small_source(), "q8")
    exact = ["--prompt", "x", "--mode", "exact", "--drafter", "ngram"]
    for words, told in [
        (["generate", "--model", str(out), *exact], "exported from a diffusion model"),
        (["generate", "--model", str(drafts), *asked], "exported from an autoregressive model"),
        (["bench", "decode", "--model", str(out)], "is an export for ONNX Runtime"),
        (["export", str(checkpoint), "--parent", "tiny", "--out", str(tmp_path / "x")], "has no draft adapters"),
    ]:
        assert main(words) == 2
        error = capsys.readouterr().err
        assert told in error and error.strip().count("\n") == 0, error


def _strange_graph() -> bytes:
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("a", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("b", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Abs", ["a"], ["b"])], "other", [value], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    data: bytes = model.SerializeToString()
    return data


def test_a_model_is_exported_and_written_with_and_the_second_time_comes_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnx", reason="the extra onnx is not installed")
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    monkeypatch.setenv("HILDANEXT_HOME", str(tmp_path / "home"))
    out = tmp_path / "tiny-q8"
    assert main(["export", "tiny", "--dtype", "q8", "--out", str(out)]) == 0
    assert "tiny in q8" in capsys.readouterr().out
    asked = ["--mode", "exact", "--drafter", "ngram", "--prompt", "Once upon a time", "--max-new-tokens", "12"]
    assert main(["generate", "--model", str(out), *asked]) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr(onnx_open, "export_checked", None)
    assert not (tmp_path / "home" / "onnx").exists()
    with pytest.raises(TypeError):
        main(["generate", "--model", "tiny", "--dtype", "q8", *asked])
    monkeypatch.undo()
    monkeypatch.setenv("HILDANEXT_HOME", str(tmp_path / "home"))
    for _ in range(2):
        assert main(["generate", "--model", "tiny", "--dtype", "q8", *asked]) == 0
        assert capsys.readouterr().out.splitlines()[0] == first.splitlines()[0]
        monkeypatch.setattr(onnx_open, "export_checked", None)
