"""Messages of upstream that tell a reader of our scripts nothing are left out, each with its reason.

It must be imported before them: some talk while they are imported.
"""

import logging
import re
import warnings
from collections.abc import Callable

_ROW = re.compile(r"^(\S+) +\| *\S*(MISSING|UNEXPECTED|MISMATCH|CONVERSION)", re.MULTILINE)


def _is_about_a_new_head(message: str) -> bool:
    """Whether a report of loading names the new head of a reward model or critic and nothing else."""
    names = {name for name, _ in _ROW.findall(message)}
    return "LOAD REPORT" in message and names == {"score.weight"}


# Logger -> which of its messages are left out.
LEFT_OUT: dict[str, Callable[[str], bool]] = {
    # bitsandbytes: a faster kernel for 4-bit weights on a CPU, which nobody trains on.
    "bitsandbytes.backends.cpu.ops": lambda message: message.startswith("Failed to load CPU gemm_4bit_forward"),
    # DeepSpeed is imported where it is installed, used or not, and looks for a GPU; accelerate says what it runs on.
    "DeepSpeed": lambda message: message.startswith("Setting accelerator to CPU"),
    # A reward model begins with a new head; its table of trained parameters shows it.
    "transformers.modeling_utils": _is_about_a_new_head,
}


def silence() -> None:
    """Leaves these messages out from now on; calling it again changes nothing."""
    for name, is_left_out in LEFT_OUT.items():
        logger = logging.getLogger(name)
        if not any(isinstance(present, _LeavesOut) for present in logger.filters):
            logger.addFilter(_LeavesOut(is_left_out))
    # TRL still uses the names that transformers has deprecated, so every configuration and rollout warns. Delete when
    # TRL has `activation_checkpointing`.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing(_enable|_disable)?` is deprecated", FutureWarning)
    # tqdm in a notebook without ipywidgets, whose bars are text then.
    warnings.filterwarnings("ignore", "IProgress not found")


class _LeavesOut(logging.Filter):
    def __init__(self, is_left_out: Callable[[str], bool]):
        super().__init__()
        self._is_left_out = is_left_out

    def filter(self, record: logging.LogRecord) -> bool:
        return not self._is_left_out(record.getMessage())


silence()
