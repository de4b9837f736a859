"""The numbers of a `config.json` that decide how much memory a model takes.

The known models' descriptions are part of the package, so that a plan needs neither weights nor a network.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from hildanext.core.errors import ModelError
from hildanext.core.json_text import parse
from hildanext.core.run_dir import expand_home
from hildanext.models.loading import tiny
from hildanext.models.loading.files import read_model_json
from hildanext.models.loading.model_config import head_dim, read_config
from hildanext.models.loading.names import CONFIG, KNOWN, NAMES, is_hub_id, pulled_folder, refuse_run


@dataclass(frozen=True)
class Architecture:
    """Widths of a decoder. `query` and `key` are those of all heads together."""

    name: str
    family: str
    layers: int
    hidden: int
    inner: int
    """Width of the feed-forward part."""
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    biased: bool
    """Whether queries, keys and values have biases."""

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def normed_heads(self) -> bool:
        """Qwen3 norms queries and keys."""
        return self.family == "qwen3"

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """(in, out) of every linear layer of a decoder layer."""
        return {
            "q_proj": (self.hidden, self.query),
            "k_proj": (self.hidden, self.key),
            "v_proj": (self.hidden, self.key),
            "o_proj": (self.query, self.hidden),
            "gate_proj": (self.hidden, self.inner),
            "up_proj": (self.hidden, self.inner),
            "down_proj": (self.inner, self.hidden),
        }

    @property
    def layer_matrices(self) -> int:
        """Weights in the linear layers of one decoder layer."""
        return sum(rows * columns for rows, columns in self.linear.values())

    @property
    def matrices(self) -> int:
        return self.layers * self.layer_matrices

    @property
    def embedding(self) -> int:
        return self.vocab * self.hidden

    @property
    def vectors(self) -> int:
        """Norms and biases."""
        biases = self.query + 2 * self.key if self.biased else 0
        norms = 2 * self.hidden + (2 * self.head_dim if self.normed_heads else 0)
        return self.layers * (biases + norms) + self.hidden

    @property
    def parameters(self) -> int:
        return self.matrices + self.vectors + self.embedding * (1 if self.tied else 2)

    def adapters(self, rank: int, targets: tuple[str, ...]) -> int:
        """Weights of LoRA adapters, the mask's own vector included."""
        widths = sum(sum(self.linear[name]) for name in targets if name in self.linear)
        return self.layers * rank * widths + self.hidden


def read_architecture(config: Mapping[str, Any], name: str) -> Architecture:
    """Sizes that the configuration leaves out are Transformers' own. Raises `ModelError` as `read_config` does."""
    filled = read_config(config, name)
    family = str(filled.model_type)
    return Architecture(
        name=name,
        family=family,
        layers=filled.num_hidden_layers,
        hidden=filled.hidden_size,
        inner=filled.intermediate_size,
        heads=filled.num_attention_heads,
        kv_heads=filled.num_key_value_heads,
        head_dim=head_dim(filled),
        vocab=filled.vocab_size,
        tied=bool(filled.tie_word_embeddings),
        biased=family == "qwen2" or bool(getattr(filled, "attention_bias", False)),
    )


def find_architecture(name: str) -> Architecture:
    """By short name, folder (weights need not be there), `config.json`, hub id that was pulled, or GGUF file.

    Raises `ModelError`.
    """
    path = expand_home(name)
    is_local = name not in NAMES and path.exists()
    return read_architecture(describe(name), path.resolve().name if is_local and path.is_dir() else name)


def describe(name: str) -> dict[str, Any]:
    """The `config.json` of a model, from the places `find_architecture` looks in. Raises `ModelError`."""
    if name == "tiny":
        return read_model_json(tiny.folder("ar") / CONFIG)
    path = expand_home(name)
    if path.suffix == ".gguf":
        return _of_gguf(path)
    if name in KNOWN or (is_hub_id(name) and not path.exists()):
        pulled = pulled_folder(name)
        if pulled.is_dir():
            return read_model_json(pulled / CONFIG)
        if name in KNOWN:
            asset = files("hildanext") / "assets" / "architectures" / f"{name}.json"
            config: dict[str, Any] = parse(asset.read_bytes())
            return config
        raise ModelError(f"{name!r} has not been pulled", f"run: hildanext pull {name}, or give its config.json")
    if path.is_dir():
        refuse_run(path)
    if path.is_file() or path.is_dir():
        return read_model_json(path if path.is_file() else path / CONFIG)
    raise ModelError(f"no model {name!r}", f"give a folder, a config.json or one of {', '.join(NAMES)}")


def _of_gguf(path: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    if not path.is_file():
        raise ModelError(f"no file {str(path)!r}", "give the path of a .gguf file")
    try:
        fields: dict[str, Any] = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    except (OSError, ValueError, KeyError, ImportError) as problem:
        raise ModelError(f"cannot read {str(path)!r} ({problem})", "download or copy the file again") from None
    return fields
