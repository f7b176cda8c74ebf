"""`trl-vlm estimate`: how much memory a training will need, before anything is loaded."""

import argparse
from collections.abc import Mapping, Sequence

from trl_vlm.cli.options import positive, write
from trl_vlm.cli.parsing import CommandParser
from trl_vlm.scripts.estimate import Lengths, estimate_of, report


def read(
    methods: Mapping[str, tuple[str, str]], command: CommandParser, words: Sequence[str], options: argparse.Namespace
) -> None:
    """Reads the words: options of this command, a method, and what the method's command takes.

    Args:
        methods: Script of each method, by its name.
        command: Names the program in the help.
        words: What follows the command's name.
        options: Gets `estimate`, `gpu_memory`, and `run`.
    """
    parser = argparse.ArgumentParser(
        prog=command.prog,
        description="Estimate the memory of a training on each device; what follows are the options of its command.",
        allow_abbrev=False,
    )
    parser.add_argument("method", choices=[name for name in methods if name != "demo"])
    parser.add_argument(
        "--tokens", type=positive, help="of the longest sequence: prompt, images, reply (default: 1024)"
    )
    parser.add_argument(
        "--prompt-tokens",
        type=positive,
        help="of the longest prompt with its images, in place of --tokens: replies that share it then count it once, "
        "as in training",
    )
    parser.add_argument(
        "--reply-tokens",
        type=positive,
        help="of the longest reply, and of what is behind it (default: what the method samples at most)",
    )
    parser.add_argument(
        "--replies", type=positive, help="of a row of DPO, further rejected ones included (default: 2)"
    )
    parser.add_argument("--gpu-memory", type=float, help="GB of a card, as it is sold: what to change if that is less")
    ours, rest = parser.parse_known_args(words)
    lengths = Lengths(ours.tokens, ours.prompt_tokens, ours.reply_tokens, ours.replies)
    try:
        options.estimate = estimate_of(methods[ours.method][0], rest, lengths, command.prog)
    except (ValueError, OSError) as error:
        command.exit(2, f"error: {error}\n")
    options.gpu_memory, options.run = ours.gpu_memory, run


def run(options: argparse.Namespace) -> int:
    """Prints the estimate."""
    write(report(options.estimate, options.gpu_memory))
    return 0
