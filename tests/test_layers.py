"""Who may import whom: see docs/design.md. Imports point down only."""

import ast
from pathlib import Path

import trl_vlm

ROOT = Path(trl_vlm.__file__).parent
BELOW = {
    "maths": set(),
    "models": {"maths"},
    "data": {"maths", "models"},
    "rewards": {"maths", "models", "data"},
    "judges": {"maths", "models", "data", "rewards"},
    "pairs": {"maths", "models", "data", "rewards", "judges"},
    "evaluation": {"maths", "models", "data", "rewards", "judges"},
    "look": {"maths", "data", "evaluation"},
    "trainers": {"maths", "models", "data", "rewards", "judges", "pairs", "evaluation"},
    "testbed": {"maths", "models", "data", "rewards", "judges", "evaluation"},
    "doctor": {"maths", "models", "data", "rewards", "trainers", "requirements"},
    "scripts": {"maths", "models", "data", "rewards", "judges", "pairs", "evaluation", "look", "trainers"},
    "cli": {"maths", "models", "data", "rewards", "judges", "pairs", "evaluation", "look", "trainers", "scripts"}
    | {"doctor"},
    # The tutorial of examples/, for `trl-vlm demo`.
    "demo": {"data", "models", "rewards", "evaluation", "trainers", "scripts", "testbed"},
    "requirements": set(),
    "lazy": set(),  # how packages load their names; all may use it
    "__init__": {"requirements", "trainers"},  # trainers under `TYPE_CHECKING`: see test_public_names.py
}
MAY_IMPORT_TRL = {"trainers", "scripts", "doctor", "demo"}


def imported_modules(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{path}:{node.lineno}: relative import; this project imports absolutely")


def test_imports_point_down_only():
    files = sorted(ROOT.rglob("*.py"))
    assert len(files) > 10
    for path in files:
        here = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for line, module in imported_modules(path):
            if module.startswith("trl_vlm."):
                there = module.split(".")[1]
                assert there in BELOW[here] | {here, "lazy"}, f"{path}:{line}: {here} may not import {there}"
            if module == "trl" or module.startswith("trl."):
                allowed = here in MAY_IMPORT_TRL or path == ROOT / "data" / "encoding.py"
                assert allowed, (
                    f"{path}:{line}: trl is imported in trainers, scripts, doctor, demo and data/encoding.py alone"
                )


def test_maths_needs_torch_and_the_standard_library_alone():
    for path in (ROOT / "maths").glob("*.py"):
        for line, module in imported_modules(path):
            root = module.split(".")[0]
            assert root in {"torch", "typing", "difflib", "collections", "math", "trl_vlm", "dataclasses"}, (
                f"{path}:{line}: {module}"
            )
