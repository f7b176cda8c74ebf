"""The documentation keeps up with the code: names, links, metrics, options, quoted errors."""

import ast
import dataclasses
import inspect
import re
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch

from trl_vlm.rewards import FactRLHFReward
from trl_vlm.trainers.reward.metrics import score_statistics

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trl_vlm"
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md"))
METHOD_PAGES = sorted(path for path in (DOCS / "methods").glob("*.md"))
PUBLIC_MODULES = ("", ".judges", ".rewards", ".evaluation", ".models", ".data", ".testbed", ".pairs")
CONFIGS = ("PPOConfig", "RewardConfig", "DPOConfig")
HEADINGS = (
    "Idea",
    "Objective",
    "Data it needs",
    "Minimal run",
    "Options that matter",
    "Logged metrics",
    "Where we differ from the paper and its code",
    "Reference numbers",
    "Cost",
)
# Strings of these shapes in the trainers are names of logged metrics, and belong on this page.
METRIC_PAGES = {
    r"ppo/\w+": "ppo",
    r"(dense|drift|degeneration|pairs)/\w+": "dpo",
    r"(image|anchor)/\w+": "image_preference",
}


def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@cache
def string_templates() -> list[str]:
    """Every string of the package; an f-string's values are written as `…`."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    assert len(found) > 500
    return found


def strings_of(paths: list[Path]) -> set[str]:
    assert paths
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_every_public_name_stands_in_the_docs(module):
    text = "\n".join(prose(page) for page in PAGES)
    names = import_module(f"trl_vlm{module}").__all__
    assert names
    missing = [name for name in names if f"`{name}`" not in text]
    assert not missing, f"trl_vlm{module}: add {missing} to docs/reference.md"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda path: path.stem)
def test_every_relative_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(path), f"{page.name} links to {target}, and {path.name} has no such heading"


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", METHOD_PAGES, ids=lambda path: path.stem)
def test_a_method_page_has_the_fixed_headings(page):
    headings = re.findall(r"^## (.+)$", prose(page), flags=re.MULTILINE)
    wanted = [next((h for h in headings if h.lower().startswith(name.lower())), None) for name in HEADINGS]
    assert None not in wanted, f"{page.name} lacks {HEADINGS[wanted.index(None)]!r}"
    assert sorted(wanted, key=headings.index) == wanted, f"the headings of {page.name} are in another order"


@pytest.mark.parametrize(("pattern", "page"), METRIC_PAGES.items(), ids=METRIC_PAGES.values())
def test_every_logged_metric_has_a_line_on_its_page(pattern, page):
    names = {text for text in strings_of(sorted((PACKAGE / "trainers").rglob("*.py"))) if re.fullmatch(pattern, text)}
    assert len(names) > 3
    text = prose(DOCS / "methods" / f"{page}.md")
    missing = sorted(name for name in names if f"`{name}`" not in text)
    assert not missing, f"docs/methods/{page}.md has no line for {missing}"


def test_every_metric_of_the_reward_trainer_has_a_line():
    names = score_statistics(torch.tensor([[1.0, 0.0], [0.5, 0.7]]))
    text = prose(DOCS / "methods" / "reward_model.md")
    assert not [name for name in names if f"`{name}`" not in text]


def test_the_parts_of_the_fact_rlhf_reward_have_a_line():
    logged = {}
    reward = FactRLHFReward(lambda prompts, completions, **columns: [1.0] * len(completions), eos_token_ids=2)
    reward([[]], ["a cup"], [[5, 2]], log_metric=logged.__setitem__)
    text = prose(DOCS / "methods" / "ppo.md")
    assert len(logged) == 4
    assert not [name for name in logged if f"`{name}`" not in text]


def own_options(name: str) -> list[dataclasses.Field]:
    """The fields that a configuration of ours adds to TRL's, or changes."""
    config = getattr(import_module("trl_vlm"), name)
    ours = [parent for parent in config.__mro__ if parent.__module__.startswith("trl_vlm.")]
    own = {name for parent in ours for name in inspect.get_annotations(parent)}
    options = [field for field in dataclasses.fields(config) if field.name in own]
    assert len(options) > 5
    return options


@pytest.mark.parametrize("name", CONFIGS)
def test_every_option_of_ours_has_a_help(name):
    assert not [option.name for option in own_options(name) if not option.metadata.get("help")]


@pytest.mark.parametrize(
    ("page", "name"), [("ppo", "PPOConfig"), ("reward_model", "RewardConfig"), ("dpo", "DPOConfig")]
)
def test_every_option_of_ours_stands_on_its_page(page, name):
    text = prose(DOCS / "methods" / f"{page}.md")
    missing = [option.name for option in own_options(name) if f"`{option.name}`" not in text]
    assert not missing, f"docs/methods/{page}.md does not mention {missing}"


def quoted_messages() -> list[str]:
    """The headings of the troubleshooting page that quote this package."""
    ours = prose(DOCS / "troubleshooting.md").split("## Messages of other libraries")[0]
    return [heading.strip("` ") for heading in re.findall(r"^### (.+)$", ours, flags=re.MULTILINE)]


def quotes(message: str, template: str) -> bool:
    """Whether a message with `…` for its values quotes a string of the source."""
    place = 0
    for fragment in filter(None, (part.strip() for part in message.split("…"))):
        found = template.find(fragment, place)
        if found < 0:
            return False
        place = found + len(fragment)
    return True


def test_quoted_errors_are_those_of_the_code():
    messages = quoted_messages()
    assert len(messages) > 30
    unknown = [message for message in messages if not any(quotes(message, text) for text in string_templates())]
    assert not unknown, f"docs/troubleshooting.md quotes what no line of the package says: {unknown}"
