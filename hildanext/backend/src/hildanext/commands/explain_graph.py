"""`hildanext explain-graph`: one example's causal graph, in words and as a picture.

hildanext explain-graph data/gsm8k/graphs.jsonl --id gsm8k-train-0
hildanext explain-graph data/gsm8k/graphs.jsonl --tokenizer smollm2-135m --png graph.png
"""

import argparse
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from hildanext.core.errors import ConfigError

if TYPE_CHECKING:
    from hildanext.data.causal_graphs.corpus import GraphExample
    from hildanext.data.causal_graphs.explain import Piece

STYLES = ("bold blue", "bold yellow", "bold green", "bold magenta", "bold red", "bold cyan")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="examples with graphs (hildanext prepare --graphs writes them)")
    parser.add_argument("--id", metavar="ID", help="which example; the first one with a graph if not given")
    parser.add_argument("--png", metavar="FILE", help="draw it into this file as well")
    parser.add_argument(
        "--tokenizer", metavar="MODEL", help="show the tokens too, as this model's chat template has them"
    )
    parser.add_argument("--block-size", type=int, default=32, metavar="N", help="for counting what a block sees (32)")


def run(options: argparse.Namespace) -> int:
    from hildanext.data.causal_graphs.corpus import find_example
    from hildanext.data.causal_graphs.explain import field_tokens, marked, node_lines, token_lines

    if options.block_size < 1:
        raise ConfigError(f"--block-size {options.block_size}", "a block has at least one token")
    example = find_example(options.file, options.id)
    rendering = _rendered(example, options.tokenizer) if options.tokenizer else None
    out = _Printer(example)
    out.line([_piece(f"{example.id}: {_summary(example)}")])
    for field in ("prompt", "response"):
        out.line([_piece(f"\n{field}:")])
        out.line(marked(example, field))
    if example.graph is not None:
        out.line([_piece("\nnodes, and what each was made from:")])
        for line in node_lines(example.graph):
            out.line(line)
    if example.graph is not None and rendering is not None:
        out.line([_piece(f"\ntokens of {options.tokenizer}:")])
        for line in token_lines(example.graph, rendering.text, rendering.offsets, rendering.fields, options.block_size):
            out.line(line)
    if options.png:
        from hildanext.data.causal_graphs.picture import draw

        tokens = rendering and {name: field_tokens(rendering.offsets, at) for name, at in rendering.fields.items()}
        note = f"tokens of {options.tokenizer}" if tokens is not None else ""
        print(f"\n{draw(example, options.png, tokens, note)}")
    return 0


def _rendered(example: "GraphExample", tokenizer_name: str) -> Any:
    """The example as a training row of that model."""
    from hildanext.data.chat_template import Message, make_example, render, set_template
    from hildanext.models.loading.names import locate
    from hildanext.stages.prepare import load_tokenizer

    tokenizer = load_tokenizer(locate(tokenizer_name))
    set_template(tokenizer)
    turns = [Message("user", example.prompt), Message("assistant", example.response)]
    return render(tokenizer, make_example(turns, example.id))[-1]


def _summary(example: "GraphExample") -> str:
    graph = example.graph
    if graph is None:
        return "no graph"
    return f"{len(graph.nodes)} nodes and {len(graph.edges)} edges, made by {graph.source}"


def _piece(text: str) -> "Piece":
    from hildanext.data.causal_graphs.explain import Piece

    return Piece(text)


class _Printer:
    """Prints pieces, nodes in colours where the terminal has them; without colours the brackets say it all."""

    def __init__(self, example: "GraphExample") -> None:
        from rich.console import Console

        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        nodes = example.graph.nodes if example.graph is not None else ()
        self.styles = {node.id: STYLES[number % len(STYLES)] for number, node in enumerate(nodes)}

    def line(self, pieces: "Iterable[Piece]") -> None:
        from rich.text import Text

        self.console.print(Text.assemble(*((text, self.styles.get(node or "", "")) for text, node in pieces)))
