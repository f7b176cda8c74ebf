"""Runs the contracts with TRL, transformers and PEFT against their newest releases, and says which one broke.

    python .ci/upstream.py              # each of the three by itself, then all of them
    python .ci/upstream.py trl peft     # these

Each runs in an environment of its own with the set of constraints.txt, but for the newest release of one package. A
test's name is the contract: the last lines list those that no longer hold, with the release that broke them. The exit
code is 1 if there is any.
"""

import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("trl", "transformers", "peft")
ALL = "all"
# What we rely on: private names and behavior, equal losses, families, exact resuming.
CONTRACTS = (
    "tests/trainers/test_trl_seams.py",
    "tests/trainers/test_fsdp.py",
    "tests/trainers/dpo/test_seams.py",
    "tests/trainers/dpo/test_parity.py",
    "tests/models/test_transformers_seams.py",
    "tests/models/test_peft_seams.py",
    "tests/models/test_reward_model.py",
    "tests/trainers/test_options.py",
    "tests/trainers/ppo/test_setup.py",
    "tests/trainers/reward/test_trainer.py",
    "tests/trainers/test_reply_ends.py",
    "tests/test_families.py",
)


def constraints(text: str, newest: Sequence[str]) -> str:
    """The lines of a constraints file without those of some packages."""
    return "".join(line for line in text.splitlines(True) if line.partition("==")[0] not in newest)


def install(folder: Path, newest: Sequence[str]) -> Path:
    """An environment with the newest releases of some packages; returns its Python."""
    venv.create(folder, with_pip=True)
    python, rest = folder / "bin" / "python", folder / "constraints.txt"
    rest.write_text(constraints((ROOT / "constraints.txt").read_text(), newest))
    pip = [str(python), "-m", "pip", "install", "--quiet", "-c", str(rest)]
    subprocess.run([*pip, "-e", f"{ROOT}[dev]"], check=True)
    # Beyond our own upper bounds, too: a new major release is what one wants to hear of.
    subprocess.run([*pip, "--upgrade", *newest], check=True)
    return python


def broken(python: Path) -> list[str]:
    """The contracts that do not hold, as pytest names them with their reasons."""
    command = [str(python), "-m", "pytest", "-q", "--families", "quick", "-p", "no:cacheprovider", *CONTRACTS]
    wide = {**os.environ, "COLUMNS": "300"}  # pytest cuts the reasons to the width of the terminal
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=wide)
    found = re.findall(r"^(?:FAILED|ERROR) (.+)$", run.stdout, flags=re.MULTILINE)
    if run.returncode and not found:  # not a single test could be collected
        last = (run.stdout + run.stderr).strip().splitlines()[-5:]
        found = [f"pytest could not run them: {' / '.join(last)}"]
    return found


def releases(python: Path, packages: Sequence[str]) -> str:
    """Name and release of each package."""
    code = "import sys; from importlib.metadata import version as v; print(*(f'{p} {v(p)}' for p in sys.argv[1:]))"
    return subprocess.run([str(python), "-c", code, *packages], capture_output=True, text=True).stdout.strip()


def main(wanted: Sequence[str]) -> int:
    """Checks each package, and then all together."""
    found: dict[str, list[str]] = {}
    for name in wanted or (*PACKAGES, ALL):
        newest = PACKAGES if name == ALL else (name,)
        with tempfile.TemporaryDirectory() as folder:
            python = install(Path(folder), newest)
            about = releases(python, newest)
            print(f"== {about}", flush=True)
            found[about] = broken(python)
    for about, contracts in found.items():
        broke = f"{len(contracts)} contract{'s' if len(contracts) > 1 else ''} broke"
        print(f"{about}: {broke if contracts else 'every contract holds'}")
        for contract in contracts:
            print(f"  {contract}")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
