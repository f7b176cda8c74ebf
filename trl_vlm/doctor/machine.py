"""What a machine has to train with: versions, backends, devices, folders. Imports torch, and nothing heavier."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.version import Version

from trl_vlm.doctor.findings import Finding, note
from trl_vlm.requirements import EXTRAS, OLDEST, TESTED

GIB = 2**30
# Package -> what it serves.
BACKENDS = {
    "deepspeed": "ZeRO (`--accelerate_config zero2`)",
    "bitsandbytes": "4-bit and 8-bit bases, 8-bit optimizers",
    "flash-attn": "`--attn_implementation flash_attention_2`",
    "vllm": "faster sampling in PPO, GRPO and RLOO",
    "liger-kernel": "`--use_liger_kernel`",
    "torchvision": "video parts of processors; images do without",
    "sentence-transformers": "BDHS",
}
# File systems that several machines can see.
SHARED = (
    "nfs",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "glusterfs",
    "wekafs",
    "panfs",
    "cifs",
    "smb",
    "efs",
    "pvfs",
    "daos",
)
_LITTLE_SPACE = 50 * GIB
_LITTLE_SHARED_MEMORY = GIB


def versions(oldest: Mapping[str, str] = OLDEST, tested: Mapping[str, str] = TESTED) -> list[Finding]:
    """Each package that every training needs.

    Args:
        oldest: The oldest release that works, by package.
        tested: The release that the tests run with, by package.
    """
    return [_release(package, _installed(package), oldest[package], tested[package]) for package in oldest]


def backends(oldest: Mapping[str, str] = EXTRAS, tested: Mapping[str, str] = TESTED) -> list[Finding]:
    """Each package that some trainings need, or are faster with.

    Args:
        oldest: As for `versions`; packages without one are not part of the tests.
        tested: As for `versions`.
    """
    findings = []
    for package, use in BACKENDS.items():
        found = _installed(package)
        if found is None or package not in oldest:
            findings.append(note(package, f"{found or 'not installed'}; for {use}"))
        else:
            findings.append(_release(package, found, oldest[package], tested[package]))
    return findings


def _release(package: str, found: str | None, oldest: str, tested: str) -> Finding:
    if found is None:
        return Finding(package, "differs", f"not installed: `pip install '{package}>={oldest}'`")
    base = Version(Version(found).base_version)  # a build (2.13.0+cu128) is as good as the release
    if base < Version(oldest):
        return Finding(package, "differs", f"{found} is older than {oldest}: `pip install -U '{package}>={oldest}'`")
    if base == Version(tested):
        return Finding(package, "ok", f"{found}, as in the tests")
    return note(package, f"{found}; the tests run with {tested}")


def devices() -> list[Finding]:
    """The devices, and the precision that they train in."""
    import torch

    if torch.cuda.is_available():
        cards = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        return [_cuda(index, card.name, card.total_memory, card.major) for index, card in enumerate(cards)]
    if Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia/version").exists():
        reason = "was built without CUDA" if torch.version.cuda is None else f"(CUDA {torch.version.cuda}) finds none"
        text = f"there is an NVIDIA device, and torch {torch.__version__} {reason}: training would run on the CPU"
        return [Finding("devices", "differs", text)]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        return [note("devices", f"{torch.accelerator.device_count()} x {accelerator.type}; scripts load in float32")]
    return [note("devices", f"no accelerator, {os.cpu_count()} CPU cores; scripts load in float32")]


def _cuda(index: int, model: str, memory: int, generation: int) -> Finding:
    card = f"{model}, {memory / GIB:.1f} GiB"
    if generation < 8:
        text = f"{card}; no bfloat16, which the scripts load in: give `--dtype float16` or `--dtype float32`"
        return Finding(f"device {index}", "differs", text)
    return Finding(f"device {index}", "ok", f"{card}; bfloat16, which the scripts load in")


def folders(output: str | os.PathLike) -> list[Finding]:
    """Where models are downloaded to and results are written, with their free space; and the shared memory.

    Args:
        output: The output folder of a training.
    """
    several = nodes() > 1
    found = [_folder("HF_HOME", hub_folder(), several), _folder("output", Path(output), several)]
    memory = Path("/dev/shm")
    if memory.is_dir() and shutil.disk_usage(memory).total < _LITTLE_SHARED_MEMORY:
        size = shutil.disk_usage(memory).total / 2**20
        text = f"{size:.0f} MiB; data loaders and NCCL exchange through it, and want more: `docker run --shm-size 16g`"
        found.append(note("/dev/shm", text))
    return found


def _folder(name: str, path: Path, several_nodes: bool) -> Finding:
    there = next(parent for parent in (path, *path.resolve().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return Finding(name, "differs", f"{path} cannot be written to ({error.strerror})")
    kind = file_system(there)
    is_shared = any(known in kind for known in SHARED)
    free = shutil.disk_usage(there).free
    text = f"{path} on {kind}, {free / GIB:,.0f} GiB free"
    if several_nodes and not is_shared:
        return Finding(name, "differs", f"{text}; several nodes run, and a disk of this kind is seen by one alone")
    if free < _LITTLE_SPACE:
        return note(name, f"{text}: a model of 7B and its checkpoints need more")
    where = "which other nodes can see" if is_shared else "which this machine alone sees: enough for one node"
    return Finding(name, "ok", f"{text}, {where}")


def cluster() -> list[Finding]:
    """How many nodes run now, and what several need."""
    count = nodes()
    if count > 1:
        return [
            note("nodes", f"{count}, this one is number {os.environ.get('SLURM_NODEID', '?')}; see docs/clusters.md")
        ]
    text = (
        "one. Several need one output folder and dataset that all see, HF_HOME seen by all or filled on each, and the "
        "rank of each node with the address and port of the first: docs/clusters.md"
    )
    return [note("nodes", text)]


def nodes() -> int:
    """How many nodes the scheduler or launcher has started this on."""
    of_scheduler = os.environ.get("SLURM_JOB_NUM_NODES") or os.environ.get("SLURM_NNODES")
    if of_scheduler and of_scheduler.isdigit():
        return int(of_scheduler)
    world, local = (os.environ.get(name, "1") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    return max(1, int(world) // int(local)) if "LOCAL_WORLD_SIZE" in os.environ else 1


def hub_folder() -> Path:
    """Where models and datasets of the hub are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("HF_HOME") or cache / "huggingface").expanduser()


def file_system(path: Path, mounts: str | os.PathLike = "/proc/self/mounts") -> str:
    """The kind of file system that a path lies on; "an unknown file system" where the machine does not say.

    Args:
        path: Exists.
        mounts: The table of mounted file systems.
    """
    places = path.resolve()
    found = [(target, kind) for target, kind in _mounts(Path(mounts)) if places.is_relative_to(target)]
    return max(found, key=lambda entry: len(entry[0]))[1] if found else "an unknown file system"


def _mounts(table: Path) -> Iterator[tuple[str, str]]:
    """Where each file system is mounted, and its kind."""
    if not table.is_file():
        return
    for line in table.read_text(encoding="utf-8", errors="replace").splitlines():
        _, target, kind, *_ = line.split()
        yield target.replace("\\040", " "), kind


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
