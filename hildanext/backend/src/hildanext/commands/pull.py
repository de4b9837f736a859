"""Fetch a model once, whole, into the models folder.

hildanext pull smollm2-135m
hildanext pull qwen3-0.6b
hildanext pull owner/name
"""

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="smollm2-135m, qwen3-0.6b, qwen3-1.7b, or a hub id (owner/name)")
    parser.add_argument("--force", action="store_true", help="fetch it again even if it is here")


def run(options: argparse.Namespace) -> int:
    from hildanext.models.loading.pull import pull

    pull(options.model, force=options.force)
    return 0
