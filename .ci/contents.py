"""Whether a wheel and a source distribution hold what README.md names: `python .ci/contents.py dist/*`."""

import sys
import tarfile
import zipfile
from pathlib import Path

NEEDED = (
    "trl_vlm/demo.py",
    "trl_vlm/look/assets/look.js",
    "trl_vlm/accelerate_configs/zero3.yaml",
    "trl_vlm/accelerate_configs/fsdp2.yaml",
    "trl_vlm/recipes/models/qwen2.5-vl-7b.yaml",
    "trl_vlm/recipes/methods/dense_dpo.yaml",
    "trl_vlm/recipes/hardware/1x24gb.yaml",
    "trl_vlm/recipes/two_nodes.slurm",
)
EMPTY = ("trl_vlm/py.typed",)
NOT_IN_A_WHEEL = ("tests/", "examples/", "benchmarks/", "docs/")


def files(path: Path) -> dict[str, int]:
    """Name to size of each file, without the top folder of a source distribution; links have the size 0."""
    if path.suffix == ".whl":
        return {entry.filename: entry.file_size for entry in zipfile.ZipFile(path).infolist()}
    return {entry.name.partition("/")[2]: entry.size for entry in tarfile.open(path) if not entry.isdir()}


for path in map(Path, sys.argv[1:]):
    held = files(path)
    missing = [name for name in NEEDED if not held.get(name, 0)] + [name for name in EMPTY if name not in held]
    extra = [name for name in held if path.suffix == ".whl" and name.startswith(NOT_IN_A_WHEEL)]
    if missing or extra:
        sys.exit(f"{path.name}: missing or empty {missing}, and should not hold {extra[:5]}")
    print(f"{path.name}: {len(held)} files")
