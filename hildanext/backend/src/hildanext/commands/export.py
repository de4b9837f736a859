"""Write a model for another program: draft adapters in their parent, a diffusion model or an autoregressive one.

hildanext export my-drafts --dtype q8 --out my-drafts-onnx
hildanext generate --mode exact --model my-drafts-onnx --prompt "Once upon a time"
hildanext export my-checkpoint --dtype q8 --out my-checkpoint-onnx
hildanext generate --mode S_MODE --model my-checkpoint-onnx --prompt "Once upon a time"
"""

import argparse
import importlib

from hildanext.core.errors import UnknownChoice
from hildanext.export import FORMATS


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        help="draft adapters, a diffusion checkpoint or an autoregressive model: a name, a folder or a GGUF file",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER")
    parser.add_argument("--format", default="onnx", help=f"{', '.join(FORMATS)} (default onnx)")
    parser.add_argument("--dtype", default="auto", help="fp32, q8 (default) or q4: 8 or 4 bits")
    parser.add_argument("--parent", help="of draft adapters, where it is not where their card says")
    parser.add_argument("--threads", type=int)


def run(options: argparse.Namespace) -> int:
    from hildanext.core.runtime import set_threads
    from hildanext.export.onnx_export import precision_of
    from hildanext.runtimes.onnx_session import load_onnxruntime

    if options.format not in FORMATS:
        raise UnknownChoice("format", options.format, list(FORMATS))
    precision = precision_of(options.dtype)
    load_onnxruntime()
    set_threads(options.threads)
    module, _, name = FORMATS[options.format].partition(":")
    card = getattr(importlib.import_module(module), name)(options.model, options.out, precision, options.parent)
    kind = "" if card.drafts is None else f", {card.drafts.places} drafts"
    kind += "" if card.diffusion is None else f", block {card.diffusion.block_size}"
    print(f"{options.out}: {card.parent} in {card.dtype}{kind}")
    print(f"from {card.parent} in fp32 torch, on text that it draws: {card.distance.line()}")
    return 0
