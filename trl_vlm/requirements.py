"""The oldest releases that this package works with: `import trl_vlm` stops on an older one, and names it.

pip sees to it when this package is installed. Another `pip install` later does not, and what fails then is a line deep
inside, with a reason that misleads. `make test-lowest` runs the tests with exactly these releases.
"""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

OLDEST = {
    "torch": "2.6",
    "trl": "1.16",
    "transformers": "5.23",
    "peft": "0.18",
    "accelerate": "1.15",
    "datasets": "4.7",
    "pillow": "11",
}
# Those of the optional packages.
EXTRAS = {"deepspeed": "0.19.8", "bitsandbytes": "0.49", "sentence-transformers": "5.2"}
# What the tests run with: constraints.txt.
TESTED = {
    "torch": "2.13.0",
    "trl": "1.16.0",
    "transformers": "5.23.0",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "pillow": "13.0.0",
    "deepspeed": "0.19.8",
    "bitsandbytes": "0.50.2",
    "sentence-transformers": "6.2.0",
}


def check_installed(oldest: Mapping[str, str] = OLDEST) -> None:
    """Stops where an installed release is older than needed; a package that is missing is left to its own import.

    Raises:
        ImportError: A release is too old.
    """
    old = {}
    for package, floor in oldest.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        # The base of a version: a development build of the oldest release is as good as the release.
        if Version(Version(found).base_version) < Version(floor):
            old[package] = found
    if old:
        needed = [f"{package}>={oldest[package]}" for package in old]
        raise ImportError(
            f"trl_vlm needs {' and '.join(needed)}; installed: {', '.join(f'{name} {old[name]}' for name in old)}. "
            f"Run `pip install --upgrade {' '.join(repr(requirement) for requirement in needed)}`."
        )
