"""`trl-vlm merge`: an adapter merged into its base model."""

import argparse
import sys
from pathlib import Path

from trl_vlm.cli.options import add_push, write


def add(command: argparse.ArgumentParser) -> None:
    """Adds the options of `trl-vlm merge`."""
    command.add_argument("adapter", help="folder or hub id of an adapter, of a policy or of a reward model")
    command.add_argument("--output", type=Path, required=True, help="folder of the merged model; must be empty")
    command.add_argument("--revision", help="branch, tag or commit of the adapter on the hub")
    command.add_argument(
        "--dtype", default="bfloat16", help="precision of the merged weights, or 'auto' (default: %(default)s)"
    )
    add_push(command, "model")


def run(options: argparse.Namespace) -> int:
    """Merges, and prints the folder."""
    from trl_vlm.models.merging import merge_adapter

    if options.push_to_hub:
        from trl_vlm.data.io.hub import create_repository

        create_repository(options.push_to_hub, "model", private=options.private)
    settings = {"dtype": options.dtype} | ({"revision": options.revision} if options.revision else {})
    write(str(merge_adapter(options.adapter, options.output, **settings)))
    if options.push_to_hub:
        push(options)
    return 0


def push(options: argparse.Namespace) -> None:
    """Uploads the merged model with a card, and prints where it is."""
    from huggingface_hub import HfApi

    from trl_vlm.models.loading import base_of
    from trl_vlm.trainers.card import merged_card

    base = base_of(options.adapter, **({"revision": options.revision} if options.revision else {})) or ""
    card = merged_card(options.push_to_hub, options.adapter, base, options.output)
    (options.output / "README.md").write_text(card, encoding="utf-8")
    address = HfApi().upload_folder(
        repo_id=options.push_to_hub, folder_path=options.output, commit_message="Upload with trl-vlm"
    )
    sys.stderr.write(f"Uploaded to {address}\n")
