"""README.md as a package index shows it: links to files of this repository lead nowhere there.

They become addresses below `Repository` of `[project.urls]` in pyproject.toml, or plain text while there is none.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
RELATIVE_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")


def for_an_index(text: str, repository: str | None) -> str:
    """The text without relative links; relative images are left out while the repository has no address."""

    def absolute(link: re.Match[str]) -> str:
        is_image, words, path = link.groups()
        if repository is None:
            return "" if is_image else words
        return f"{is_image}[{words}]({repository.rstrip('/')}/{'raw' if is_image else 'blob'}/main/{path})"

    return RELATIVE_LINK.sub(absolute, text)


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    setup(
        long_description=for_an_index(
            (ROOT / "README.md").read_text(encoding="utf-8"), project.get("urls", {}).get("Repository")
        ),
        long_description_content_type="text/markdown",
    )
