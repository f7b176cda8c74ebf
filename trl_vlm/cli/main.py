"""`trl-vlm`: a table of commands. Each is a module with `add(parser)` and `run(options)`, imported when it is used.

The training methods are scripts with parsers of their own (`trl_vlm.scripts`); one module starts them all.
"""

import logging
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module

from trl_vlm import __version__
from trl_vlm.cli.parsing import CommandParser
from trl_vlm.scripts.quiet import silence

# Name -> module below `trl_vlm.cli`, what it does.
COMMANDS = {
    "convert": ("convert", "convert a public dataset to rows that the trainers read"),
    "mix": ("mix", "write several converted datasets as one, each as often as its weight says"),
    "check": ("check", "check a dataset row by row; exit code 1 if anything is wrong"),
    "pairs": ("pairs", "make preference pairs with a model"),
    "evaluate": ("evaluate", "measure models on benchmarks"),
    "doctor": ("doctor", "look at the machine, and at a model: does it behave as the trainers assume?"),
    "merge": ("merge", "merge an adapter into its base model"),
    "serve-reward": ("serve_reward", "serve a reward model to trainings on other cards or machines"),
    "look": ("look", "write a page to look at pairs, runs and evaluated replies"),
}
# The processes of a launcher share out the work of these, or may all do it; of the others each would write the output.
FOR_SEVERAL_PROCESSES = ("pairs", "evaluate", "doctor")
# Name -> script, what it does.
METHODS = {
    "sft": ("trl_vlm.scripts.sft", "train with supervised replies"),
    "reward": ("trl_vlm.scripts.reward", "train a reward model that reads images and facts"),
    "dpo": ("trl_vlm.scripts.dpo", "train with DPO or Dense DPO on preference pairs"),
    "ppo": ("trl_vlm.scripts.ppo", "train with PPO: a critic and a reward model"),
    "grpo": ("trl_vlm.scripts.grpo", "train with GRPO and rewards that read images and facts"),
    "rloo": ("trl_vlm.scripts.rloo", "train with RLOO and rewards that read images and facts"),
    "bdhs": ("trl_vlm.scripts.bdhs", "train with DPO on rejected replies drawn with most of the image hidden"),
    "online-dpo": ("trl_vlm.scripts.online_dpo", "train with DPO on sampled replies that a judge ranks"),
    "demo": ("trl_vlm.demo", "Fact-RLHF end to end on a small world, on a CPU"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 1 if something is wrong.

    Args:
        arguments: What follows the program's name; `sys.argv` if None.
    """
    silence()
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for library in ("httpx", "httpx2"):  # a line for every request
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def parser() -> CommandParser:
    """The command line."""
    top = CommandParser(prog="trl-vlm", description="Command-line tools of trl_vlm.")
    top.add_argument("--version", action="version", version=f"trl-vlm {__version__}")
    commands = top.add_subparsers(required=True, metavar="command")
    for name, (module, help) in COMMANDS.items():
        commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", add=_adder(module))
    for name, (script, help) in METHODS.items():
        commands.add_parser(name, help=help, add_help=False, read=partial(_read_training, script))
    help = "estimate the memory of a training before anything is loaded"
    commands.add_parser("estimate", help=help, add_help=False, read=_read_estimate)
    return top


def _adder(module: str) -> Callable[[CommandParser], None]:
    return partial(_add_command, module)


def _add_command(module: str, command: CommandParser) -> None:
    """Adds a command's options, and what runs it."""
    code = import_module(f"trl_vlm.cli.{module}")
    code.add(command)
    command.set_defaults(run=code.run if module in FOR_SEVERAL_PROCESSES else partial(_run_alone, code.run))


def _run_alone(run: Callable[[Namespace], int], options: Namespace) -> int:
    """Runs a command that is made for one process.

    Raises:
        ValueError: A launcher started several.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if started > 1:
        raise ValueError(
            f"This command runs in one process, and a launcher started {started}: each would do all of it. Start it "
            "without `accelerate launch` or torchrun."
        )
    return run(options)


def _read_training(script: str, command: CommandParser, words: Sequence[str], options: Namespace) -> None:
    """Reads the words behind a training method, and sets what runs it."""
    import_module("trl_vlm.cli.train").read(script, command, words, options)


def _read_estimate(command: CommandParser, words: Sequence[str], options: Namespace) -> None:
    """Reads the words behind `estimate`, and sets what runs it."""
    import_module("trl_vlm.cli.estimate").read(METHODS, command, words, options)
