"""The tokenizer's side of a conversion: which id is the mask, which ids are real.

An embedding is never shrunk: tokenizers are often shorter than the matrix (Qwen3: 151,669 tokens,
151,936 rows), and the mask then takes the first free row. Where no row is free the matrix grows.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hildanext.core.errors import ModelError
from hildanext.core.json_text import BadJson, check_prompt_text, parse

logger = logging.getLogger(__name__)

MASK_TOKEN = "<|mask|>"
ROW_MULTIPLE = 64
FAST_CLASS = "PreTrainedTokenizerFast"


def resolve_mask_id(tokenizer: PreTrainedTokenizerBase, causal_lm: PreTrainedModel) -> tuple[int, int]:
    """The mask's id and the number of real ids; registers `<|mask|>` and grows the embedding where needed.

    A mask token that the tokenizer already has is kept, with its row, so that a second call changes nothing.
    A new one takes the id after the last token, in a free row where there is one; otherwise the
    embedding (and a tied or untied head) grows to the next multiple of 64. New rows start as the mean of the trained
    rows plus a little noise (see `initial_row`). Every id below the second value, except the mask, is a real token.
    """
    rows = causal_lm.get_input_embeddings().weight.shape[0]
    known = tokenizer.mask_token_id
    if known is None:
        # Counting from the highest id, because a tokenizer with holes is shorter than its ids reach.
        first_free = max(tokenizer.get_vocab().values()) + 1
        tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
        known = int(tokenizer.mask_token_id)
        if known != first_free and known >= len(tokenizer):
            raise ModelError(f"the tokenizer gave its mask the id {known}", "use a fast tokenizer (tokenizer.json)")
        if known < rows:
            _write_rows(causal_lm, torch.arange(known, known + 1), trained=first_free)
    mask_id = int(known)
    if mask_id >= rows:
        grow_rows(causal_lm, mask_id + 1)
    others = [index for index in tokenizer.get_vocab().values() if index != mask_id]
    return mask_id, max(others) + 1


def grow_rows(causal_lm: PreTrainedModel, needed: int) -> int:
    """Grow embedding and head to the next multiple of 64 that holds `needed` rows; returns the row count.

    Never shrinks. The new rows are initialised like the mask's; tied weights stay tied.
    """
    rows = causal_lm.get_input_embeddings().weight.shape[0]
    padded = -(-needed // ROW_MULTIPLE) * ROW_MULTIPLE
    if padded <= rows:
        return rows
    tied = is_tied(causal_lm)
    state = torch.random.get_rng_state()  # the resize draws noise that is overwritten below
    causal_lm.resize_token_embeddings(padded, mean_resizing=False)
    torch.random.set_rng_state(state)
    if is_tied(causal_lm) != tied:
        raise ModelError("growing the embedding broke the weight tying", "install a supported transformers version")
    causal_lm.config.vocab_size = padded
    _write_rows(causal_lm, torch.arange(rows, padded), trained=rows)
    return padded


def is_tied(causal_lm: PreTrainedModel) -> bool:
    """True where the head is the embedding matrix itself."""
    return causal_lm.get_output_embeddings().weight is causal_lm.get_input_embeddings().weight


def initial_row(matrix: Float[Tensor, "vocab hidden"], count: int = 1) -> Float[Tensor, "count hidden"]:
    """Mean of the rows plus Gaussian noise of deviation 0.02 * mean row norm / sqrt(hidden); always the same draw.

    A row that was never trained has a near-zero norm, and gradients explode at high mask ratios (LLaDA2.0,
    arXiv:2512.15745, sec. 7.1); the mean of many rows is small too, so its norm is logged.
    """
    matrix = matrix.detach().float()
    norms = matrix.norm(dim=-1)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, matrix.shape[1], generator=generator).to(matrix.device)
    rows = matrix.mean(0) + noise * (0.02 * norms.mean() / matrix.shape[1] ** 0.5)
    norm, median = float(rows.norm(dim=-1).mean()), float(norms.median())
    logger.info("mask row: norm %.4f, median of the trained rows %.4f", norm, median)
    if norm < 0.1 * median:
        logger.warning("the mask row starts at norm %.4f, below 10 %% of the median row (%.4f)", norm, median)
    return rows


@torch.no_grad()
def _write_rows(causal_lm: PreTrainedModel, index: Tensor, trained: int) -> None:
    matrices = [causal_lm.get_input_embeddings().weight]
    if not is_tied(causal_lm):
        matrices.append(causal_lm.get_output_embeddings().weight)
    for matrix in matrices:
        before = float(matrix[index].float().norm(dim=-1).mean())
        logger.info("initialising %d row(s) from id %d, norm before %.4f", len(index), int(index[0]), before)
        matrix[index.to(matrix.device)] = initial_row(matrix[:trained], len(index)).to(matrix.dtype)


def real_ids(card: Any, tokenizer: PreTrainedTokenizerBase) -> Bool[Tensor, " vocab"]:
    """Which rows are ordinary text tokens: not special, not added, not unused, not the mask.

    `card` is a `hildanext.models.Card` (it lives a layer above). These are the ids that T2T noise may draw.
    """
    real = torch.zeros(card.vocab_rows, dtype=torch.bool)
    real[[index for index in tokenizer.get_vocab().values() if index < card.vocab_rows]] = True
    outside = {card.mask_id, *card.never, *tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    real[[index for index in outside if index < card.vocab_rows]] = False
    return real


def never_ids(tokenizer: PreTrainedTokenizerBase, causal_lm: PreTrainedModel) -> tuple[int, ...]:
    """Ids that no text holds: a padding token that does not also begin or end texts."""
    pad = tokenizer.pad_token_id
    config, generation = causal_lm.config, causal_lm.generation_config
    uses: set[Any] = {None, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    for source in (config, generation):
        for value in (getattr(source, "eos_token_id", None), getattr(source, "bos_token_id", None)):
            uses.update(value if isinstance(value, list) else [value])
    # Qwen pads with <|endoftext|>, which separates documents: a text may hold it, so it is not banned.
    if pad in uses or tokenizer.convert_ids_to_tokens(pad) == "<|endoftext|>":
        return ()
    return (int(pad),)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a document's beginning: BOS where the tokenizer has one, then the text.

    Raises `PromptError` for half of a surrogate pair, which no tokenizer takes.
    """
    check_prompt_text(text)
    return begin_document(tokenizer, list(tokenizer(text, add_special_tokens=False)["input_ids"]))


def begin_document(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """The ids with BOS before them, where the tokenizer has one and it is not there already."""
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; a bare `tokenizer.json` loads the same way under every supported transformers.

    Raises `ModelError` where there is none or it cannot be read.
    """
    folder = Path(folder)
    settings = folder / "tokenizer_config.json"
    if not (folder / "tokenizer.json").is_file() and not settings.is_file():
        raise ModelError(f"{str(folder)!r} has no tokenizer", "add its tokenizer.json and tokenizer_config.json")
    _check_tokenizer_file(folder / "tokenizer.json")
    try:
        named = parse(settings.read_bytes(), allow_nan=True, allow_duplicates=True) if settings.is_file() else {}
        # Transformers 5 writes a class name that 4.x does not know; both are a plain tokenizer.json.
        if named.get("tokenizer_class", FAST_CLASS) in ("TokenizersBackend", FAST_CLASS):
            return PreTrainedTokenizerFast.from_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError, RecursionError) as problem:
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise ModelError(f"cannot read the tokenizer in {str(folder)!r} ({reason})", "copy the model again") from None


def _check_tokenizer_file(path: Path) -> None:
    """The tokenizers library raises the bare `Exception`, which nobody should have to catch; so look first."""
    if not path.is_file():
        return
    try:
        content = parse(path.read_bytes(), allow_nan=True, allow_duplicates=True)
    except (OSError, BadJson) as problem:
        raise ModelError(f"cannot read the tokenizer {path} ({problem})", "copy the model again") from None
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or "vocab" not in model:
        raise ModelError(f"cannot read the tokenizer {path} (it has no vocabulary)", "copy the model again")


def check_words(tokenizer: PreTrainedTokenizerBase, rows: int, source: object, added: bool = True) -> None:
    """Raise `ModelError` for a tokenizer with words that the embedding has no row for; `added` ones may not count."""
    beside = {} if added else tokenizer.added_tokens_decoder
    words = ((word, index) for word, index in tokenizer.get_vocab().items() if index not in beside)
    word, index = max(words, key=lambda item: item[1], default=("", -1))
    if index >= rows:
        raise ModelError(
            f"the tokenizer of {str(source)!r} has a word {word[:40]!r} with the id {index}, the model {rows} rows",
            "copy the tokenizer that belongs to these weights",
        )


def same_words(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers call the same words by the same ids. A mask, which a conversion adds, is no word."""
    first, second = one.get_vocab(), other.get_vocab()
    for tokenizer, words in ((one, first), (other, second)):
        if tokenizer.mask_token is not None:
            words.pop(str(tokenizer.mask_token), None)
    return first == second


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a tokenizer that transformers 4.51 and 5.x both read (class name, special tokens as plain fields)."""
    folder = Path(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = parse(path.read_bytes(), allow_nan=True, allow_duplicates=True)
    if (folder / "tokenizer.json").is_file():
        settings["tokenizer_class"] = FAST_CLASS
    for key in ("backend", "is_local", "local_files_only", "name_or_path", "auto_map"):
        settings.pop(key, None)
    if isinstance(settings.get("extra_special_tokens"), list):  # a list in 5.x, a mapping in 4.x
        extra = settings.pop("extra_special_tokens")
        settings.setdefault("additional_special_tokens", extra)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
