"""The commands that train: each starts a script through `accelerate launch`, as TRL's commands do.

Options of the script and of `accelerate launch` stand side by side, on the command line or in the file of `--config`.
"""

import signal
import sys
from argparse import Namespace
from collections.abc import Sequence
from types import FrameType

import psutil
from accelerate.commands.launch import launch_command
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from trl_vlm.cli.parsing import CommandParser
from trl_vlm.scripts.launcher import CONFIG_OPTION, launch_options

DEMO = "trl_vlm.demo"


def read(script: str, command: CommandParser, words: Sequence[str], options: Namespace) -> None:
    """Reads the words with the script's own parser; ends the program where one is wrong.

    Args:
        script: The script's module.
        command: Names the program in the help.
        words: What follows the method's name.
        options: Gets `launch`, the options of `accelerate launch`, and `run`.
    """
    try:
        options.launch = launch_options(script, [*_defaults(script, words), *words], command.prog)
    except (ValueError, OSError) as error:
        command.exit(2, f"error: {error}\n")
    options.run = run


def _defaults(script: str, words: Sequence[str]) -> list[str]:
    """Options of the launcher that a script has where none is given: the demo is one process in float32."""
    is_given = any(word.replace("-", "_").startswith(CONFIG_OPTION.replace("-", "_")) for word in words)
    if script != DEMO or is_given:
        return []
    return ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def run(options: Namespace) -> int:
    """Launches the script and waits for its end; who terminates the launcher terminates the script.

    `accelerate launch` leaves the one process of a script behind where it is terminated itself; several processes are
    started by torch's elastic launcher, which puts a handler of its own in the place of this one.
    """
    signal.signal(signal.SIGTERM, _pass_on)
    try:
        launch_command(options.launch)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        sys.stderr.write(f"error: process {rank} failed first, with exit code {failure.exitcode}\n")
        return 1
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    """Handles a signal: sends it to the processes that this one has started."""
    for child in psutil.Process().children():
        child.send_signal(number)
