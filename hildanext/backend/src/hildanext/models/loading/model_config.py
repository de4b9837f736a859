"""A model's `config.json`: read as Transformers' own class reads it, and checked before anything is allocated."""

import re
from collections.abc import Mapping
from typing import Any

import transformers
from huggingface_hub import errors
from transformers import CONFIG_MAPPING, PretrainedConfig

from hildanext.core.errors import ModelError
from hildanext.models.bidirectional import ARCHITECTURES

MAJOR = int(transformers.__version__.split(".")[0])
MODEL_TYPES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
"""What Transformers calls the configuration of each architecture."""
SIZES = {
    "vocab_size": 2**24, "hidden_size": 2**24, "intermediate_size": 2**24, "num_hidden_layers": 10_000,
    "num_attention_heads": 2**16, "num_key_value_heads": 2**16, "head_dim": 2**16, "max_position_embeddings": 2**40,
}  # fmt: skip
"""What a plan and a model are made of, and more than any has: Transformers would make lists of so many layers."""
REQUIRED = ("num_attention_heads", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
DEFAULTED = ("head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "attention_bias")
"""Null means here what leaving it out means; a null `num_key_value_heads` means as many as heads."""
OWN_CONFIG = "give a model's own config.json"
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")

FAULTS: tuple[type[Exception], ...] = (
    ValueError, TypeError, KeyError, AttributeError, getattr(errors, "StrictDataclassError", ValueError)
)  # fmt: skip
"""What Transformers raises for a configuration; 5.x has a class of its own for a field of another type."""

Shapes = Mapping[str, tuple[int, ...]]


def check_architecture(config: Mapping[str, Any], source: object) -> str:
    """The architecture's name. Raises `ModelError` for one that is not supported."""
    names, kind = config.get("architectures"), str(config.get("model_type", "unknown"))
    by_type = {model_type: name for name, model_type in MODEL_TYPES.items()}
    # Configurations made from a GGUF file name no architecture.
    name = str(names[0]) if isinstance(names, list) and names else str(names or by_type.get(kind, kind))
    if name not in ARCHITECTURES:
        raise ModelError(
            f"architecture {name} of {str(source)!r} is not supported", f"supported: {', '.join(ARCHITECTURES)}"
        )
    if config.get("model_type", MODEL_TYPES[name]) != MODEL_TYPES[name]:
        raise ModelError(
            f"{str(source)!r} is a {name} of model_type {kind!r}, which do not belong together", OWN_CONFIG
        )
    if config.get("use_sliding_window"):
        raise ModelError(f"{str(source)!r} uses sliding-window attention", "supported: full attention")
    return name


def read_config(fields: Mapping[str, Any], source: object) -> PretrainedConfig:
    """The configuration as Transformers' class of that architecture fills it in: what is left out has its default.

    Raises `ModelError` for an architecture that is not supported, and for sizes that are missing or cannot be.
    """
    kind = CONFIG_MAPPING[MODEL_TYPES[check_architecture(fields, source)]]
    given = {name: value for name, value in fields.items() if value is not None or name not in DEFAULTED}
    for name in REQUIRED:
        if given.get(name) is None:
            raise ModelError(f"the configuration of {str(source)!r} has no {name}", OWN_CONFIG)
    for name, most in SIZES.items():
        size = given.get(name, 1)
        if size is not None and (type(size) is not int or not 1 <= size <= most):
            raise ModelError(
                f"the configuration of {str(source)!r} has {name} = {str(size)[:40]}, and 1 to {most} make sense",
                OWN_CONFIG,
            )
    if not isinstance(given.get("rms_norm_eps", 0.0), float | int):
        raise ModelError(f"the configuration of {str(source)!r} has an rms_norm_eps that is no number", OWN_CONFIG)
    try:
        config: PretrainedConfig = kind.from_dict(given)
    except FAULTS as problem:
        said = " ".join(str(problem).split())[:200]
        raise ModelError(f"the configuration of {str(source)!r} cannot be ({said})", OWN_CONFIG) from None
    if config.num_attention_heads % config.num_key_value_heads or head_dim(config) < 1:
        raise ModelError(
            f"the configuration of {str(source)!r} has {config.num_attention_heads} heads for "
            f"{config.num_key_value_heads} of keys and a width of {config.hidden_size}",
            OWN_CONFIG,
        )
    return config


def head_dim(config: PretrainedConfig) -> int:
    """Width of a head; Qwen2's configuration has none of its own."""
    own = getattr(config, "head_dim", None)
    return int(own if own is not None else config.hidden_size // config.num_attention_heads)


def read_rope(config: PretrainedConfig, fields: Mapping[str, Any]) -> None:
    """Transformers 5 writes `rope_parameters`, which 4.x ignores: it would silently rotate with theta 10,000."""
    written = fields.get("rope_parameters")
    if MAJOR >= 5 or not isinstance(written, dict):
        return
    config.rope_theta = written.get("rope_theta", 10000.0)
    if written.get("rope_type", "default") != "default":
        config.rope_scaling = {key: value for key, value in written.items() if key != "rope_theta"}


def check_sizes(config: PretrainedConfig, shapes: Shapes, source: object) -> None:
    """Raise `ModelError` where the weights are not those that the configuration describes, told from their shapes."""
    layers = {int(found.group(1)) for name in shapes if (found := LAYER.search(name)) is not None}
    if len(layers) != config.num_hidden_layers:
        raise ModelError(
            f"config.json of {str(source)!r} says {config.num_hidden_layers} layers, its weights hold {len(layers)}",
            "copy both again, from one place",
        )
    if getattr(config, "quantization_config", None) is not None:
        return  # packed weights have shapes of their own
    hidden, width = config.hidden_size, head_dim(config)
    expected = {
        "embed_tokens.weight": (config.vocab_size, hidden),
        "q_proj.weight": (config.num_attention_heads * width, hidden),
        "k_proj.weight": (config.num_key_value_heads * width, hidden),
        "gate_proj.weight": (config.intermediate_size, hidden),
    }
    for name, shape in shapes.items():
        wanted = next((sizes for end, sizes in expected.items() if name.endswith(end)), shape)
        if shape != wanted:
            raise ModelError(
                f"{name} of {str(source)!r} has the shape {list(shape)}, config.json says {list(wanted)}",
                "copy both again, from one place",
            )
