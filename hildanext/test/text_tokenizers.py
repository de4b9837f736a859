"""Small tokenizers of every kind that decodes in a way of its own, made on the spot."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CONTROL = ("<unk>", "<s>", "</s>", "<|user|>", "<|end|>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
WORDS = ("the", "fox", "a", "s", "é", ".", "n't", "ing", "say", "1", "  ", "\n", "🦊")


def _fast(backend: Tokenizer, **more: object) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken(name, special=True) for name in CONTROL])
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"clean_up_tokenization_spaces": False, **roles, **more})


def _numbered(names) -> dict[str, int]:
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def sentencepiece() -> PreTrainedTokenizerFast:
    """Llama 2's: a space before the text, bytes for what has no piece, its chain of decoders."""
    pieces = [*"▁thefoxsay1nig.'", "▁t", "▁th", "▁the", "▁f", "▁fo", "▁fox", "▁s", "▁sa", "▁say", "▁▁", "\ufffd"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "f"), ("▁f", "o"), ("▁fo", "x"), ("▁", "s"), ("▁s", "a")]
    merges += [("▁sa", "y"), ("▁", "▁")]
    vocabulary = _numbered([*CONTROL, *BYTES, *pieces])
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(chain)
    return _fast(backend)


def metaspace() -> PreTrainedTokenizerFast:
    """As newer SentencePiece files are converted."""
    words = [f"▁{word}" for word in WORDS]
    backend = Tokenizer(models.BPE(_numbered([*CONTROL, *WORDS, *words, "▁"]), [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    return _fast(backend)


def byte_level(**more: object) -> PreTrainedTokenizerFast:
    """GPT-2's letters for bytes, with two merges and ordinary words that were added."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(_numbered([*letters, "th", "the"]), [("t", "h"), ("th", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("<｜User｜>", normalized=False)])
    return _fast(backend, **more)


def word_piece() -> PreTrainedTokenizerFast:
    """BERT's: spaces between words, none before a `##` piece, and a clean-up in the decoder itself."""
    pieces = [*WORDS, *(f"##{word}" for word in WORDS)]
    backend = Tokenizer(models.WordPiece(_numbered([*CONTROL, *pieces]), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return _fast(backend)


def word_ends() -> PreTrainedTokenizerFast:
    """The first GPT's: a word's last piece says so, and a space follows where more does."""
    pieces = [*WORDS, *(f"{word}</w>" for word in WORDS)]
    backend = Tokenizer(models.BPE(_numbered([*CONTROL, *pieces]), [], unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    backend.decoder = decoders.BPEDecoder("</w>")
    return _fast(backend)


def words() -> PreTrainedTokenizerFast:
    """No decoder at all: a space between every two."""
    backend = Tokenizer(models.WordLevel(_numbered([*CONTROL, *WORDS]), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _fast(backend)


KINDS = {make.__name__: make for make in (sentencepiece, metaspace, byte_level, word_piece, word_ends, words)}
