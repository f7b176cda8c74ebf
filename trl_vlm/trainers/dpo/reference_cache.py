"""Reference log-probabilities on disk: computed once, for image data too, and never silently stale.

A folder holds `manifest.json`, which says what the numbers were computed with, and shards of log-probabilities per
reply token, found by a hash of images, prompt and reply. Per token, so that every loss and every weighting of Dense
DPO can use one cache. Shards are written atomically, so a killed run can be resumed.
"""

import hashlib
import json
import logging
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from trl_vlm.data.io.atomic import remove_leftovers, whole, write_whole
from trl_vlm.data.rows import REJECTED_IMAGES, ROW_NAME, row_images
from trl_vlm.trainers import _trl
from trl_vlm.trainers.dpo.collator import PreferenceBatch, Row
from trl_vlm.trainers.dpo.image_collator import ImagePairCollator
from trl_vlm.trainers.types import unwrapped

if TYPE_CHECKING:
    from trl_vlm.trainers.dpo.trainer import DPOTrainer

logger = logging.getLogger(__name__)

FORMAT = "2"
MANIFEST = "manifest.json"
ROWS_PER_SHARD = 512


class ReferenceCache:
    """Log-probabilities of replies, by key.

    Args:
        folder: The folder; made if missing.
        identity: Everything that the numbers depend on, by name; all values must equal those of the folder.
        corruption: With chosen replies under corrupted images as well, what these depend on beside the row.

    Raises:
        ValueError: The folder was made with something else; the message says what.
    """

    def __init__(self, folder: str | Path, identity: dict[str, str], corruption: str | None = None):
        self.folder, self.corruption = Path(folder), corruption
        self.identity = {"format": FORMAT, **identity}
        self.log_probs: dict[str, Tensor] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        if not (self.folder / MANIFEST).exists():
            # Before any shard, so that those of a run that is killed are not taken for another model's.
            self._write_manifest({})
        made_with = self._manifest()["identity"]
        changed = [name for name, value in self.identity.items() if made_with.get(name) != value]
        if changed:
            raise ValueError(
                f"The reference cache {self.folder} was made with another {', '.join(changed)}. Its numbers do not "
                "belong to this run. Choose another `reference_cache`, or delete the folder to compute it again."
            )

    def read(self) -> None:
        """Loads every shard."""
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as shard:
                    keys = json.loads(shard.metadata()["keys"])
                    values, lengths = shard.get_tensor("log_probs"), shard.get_tensor("lengths")
            except (SafetensorError, KeyError, TypeError) as error:
                raise ValueError(
                    f"The shard {path} of the reference cache is damaged ({error}). Delete this file; its rows are "
                    "computed again."
                ) from error
            self.log_probs |= dict(zip(keys, values.split(lengths.tolist()), strict=True))

    def write(self, log_probs: dict[str, Tensor]) -> None:
        """Adds a shard atomically."""
        if not log_probs:
            return
        values = [value.float().cpu() for value in log_probs.values()]
        tensors = {"log_probs": torch.cat(values), "lengths": torch.tensor([len(value) for value in values])}
        name = hashlib.sha256("".join(log_probs).encode()).hexdigest()[:32]
        with whole(self.folder / f"{name}.safetensors") as unfinished:
            save_file(tensors, unfinished, metadata={"keys": json.dumps(list(log_probs))})

    def finish(self, name: str, keys: Iterable[str]) -> None:
        """Notes in the manifest that the dataset `name` with exactly these replies is complete."""
        self._write_manifest(self._manifest()["complete"] | {name: _digest(sorted(keys))})

    def check_data(self, name: str, keys: Iterable[str]) -> None:
        """Refuses a dataset whose rows are not those that the folder was completed for."""
        keys = list(keys)
        known = self._manifest()["complete"].get(name)
        if known is not None and known != _digest(sorted(keys)):
            missing = sum(key not in self.log_probs for key in keys)
            raise ValueError(
                f"The reference cache {self.folder} was made for other {name} data: {missing} of {len(keys)} replies "
                "are not in it. Choose another `reference_cache`, or delete the folder to compute it again."
            )

    def of_row(self, row: Row) -> list[Tensor]:
        """The log-probabilities of each reply of a row, for the collator."""
        keys = reply_keys(row, self.corruption)
        missing = [key for key in keys if key not in self.log_probs]
        if missing:
            raise ValueError(
                f"The reference cache {self.folder} does not hold {len(missing)} of the {len(keys)} replies of a row. "
                "Data that were not given to the trainer at its construction are not cached; pass them as "
                "`train_dataset` or `eval_dataset`. If they were, an image file has changed since: delete the folder."
            )
        return [self.log_probs[key] for key in keys]

    def _write_manifest(self, complete: dict[str, str]) -> None:
        write_whole(self.folder / MANIFEST, json.dumps({"identity": self.identity, "complete": complete}, indent=2))

    def _manifest(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / MANIFEST).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.folder / MANIFEST} is damaged ({error}). Delete the folder.") from error


def reply_keys(row: Row, corruption: str | None = None) -> list[str]:
    """A key for each reply of a row of the dataset, images undecoded: the chosen one, the rejected, the extra ones.

    With a `corruption` another one for the chosen reply under `rejected_images`, or else under what is drawn for the
    row's name.
    """
    if "prompt_ids" in row:
        prompt = row["prompt_ids"]
        replies = [row["chosen_ids"], row["rejected_ids"], *row.get("rejected_extra_ids", ())]
    else:
        settings = [row.get(name) for name in ("tools", "chat_template_kwargs")]
        images = [image_digest(image) for image in row_images(row, row.get(ROW_NAME) or "a row")]
        prompt = [images, row["prompt"], settings]
        replies = [row["chosen"], row["rejected"], *(row.get("rejected_extra") or ())]
    keys = _keys(prompt, replies)
    if corruption is None:
        return keys
    given = row.get(REJECTED_IMAGES)
    second = [corruption, row.get(ROW_NAME)] if given is None else [image_digest(image) for image in given]
    return keys + _keys([*prompt, second], replies[:1])


def _keys(prompt: list[Any], replies: list[Any]) -> list[str]:
    start, keys = hashlib.sha256(json.dumps(prompt, default=image_digest).encode()), []
    for reply in replies:
        key = start.copy()
        key.update(json.dumps(reply).encode())
        keys.append(key.hexdigest())
    return keys


def image_digest(image: Any) -> str:
    """A hash of an image as it is stored, nothing decoded: of the file's bytes, or of the pixels of a PIL image."""
    if isinstance(image, dict):
        image = image["path"] if image.get("bytes") is None else image["bytes"]
    if isinstance(image, bytes | bytearray):
        return hashlib.sha256(image).hexdigest()
    if isinstance(image, str | os.PathLike):
        try:
            return hashlib.sha256(Path(image).read_bytes()).hexdigest()
        except (OSError, ValueError):  # decoding it, later, names the row
            return _digest(["no file", str(image)])
    if hasattr(image, "tobytes") and hasattr(image, "size"):  # PIL images and arrays
        return _digest([str(image.size).encode(), str(getattr(image, "mode", None)).encode(), image.tobytes()])
    raise TypeError(
        f"An image came as {type(image).__name__}, which cannot be hashed. Pass PIL images, paths or bytes."
    )


def dataset_keys(cache: ReferenceCache, dataset: Any, name: str, accelerator: Accelerator) -> list[list[str]]:
    """`reply_keys` of every row, hashed once, a part on each process, and stored under the dataset's fingerprint."""
    identity = dataset_identity(dataset)
    parts = [part for part in (name, identity, cache.corruption) if part is not None]
    file = cache.folder / f"keys-{_digest(parts)[:32]}.json" if identity is not None else None
    kept = [_kept_keys(file, len(dataset)) if accelerator.is_main_process else None]
    if (keys := broadcast_object_list(kept)[0]) is not None:
        return keys
    processes = accelerator.num_processes
    own = [
        reply_keys(dataset[row], cache.corruption) for row in range(accelerator.process_index, len(dataset), processes)
    ]
    shares = gather_object([own])
    keys = [shares[row % processes][row // processes] for row in range(len(dataset))]
    if file is not None and accelerator.is_main_process:
        write_whole(file, json.dumps(keys))
    return keys


def dataset_identity(dataset: Any) -> str | None:
    """An identifier of a dataset that needs no reading of it; None if there is none."""
    rows, numbers = getattr(dataset, "rows", dataset), getattr(dataset, "numbers", None)
    # `_fingerprint` has no public name; `datasets` keeps its own cache files by it. Without it keys are hashed again.
    fingerprint = getattr(rows, "_fingerprint", None)
    return None if fingerprint is None else f"{fingerprint} {numbers}"


def _kept_keys(file: Path | None, rows: int) -> list[list[str]] | None:
    """The keys in a file; None if there is none, or a damaged one."""
    try:
        keys = json.loads(file.read_text()) if file is not None else None
    except (FileNotFoundError, ValueError):
        return None
    return keys if isinstance(keys, list) and len(keys) == rows else None


def check_shared(folder: Path, accelerator: Accelerator) -> None:
    """Refuses a folder that not all processes see, before anything is computed.

    Raises:
        ValueError: On every process.
    """
    probe = folder / f"probe-{broadcast_object_list([uuid.uuid4().hex])[0]}"
    if accelerator.is_main_process:
        probe.touch()
    accelerator.wait_for_everyone()
    seen = gather_object([probe.exists()])
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        probe.unlink()
    if not all(seen):
        blind = [process for process, sees in enumerate(seen) if not sees]
        raise ValueError(
            f"The processes {blind} do not see what the first one writes to the reference cache {folder}. Choose a "
            "`reference_cache` on storage that all nodes share."
        )


def fill(
    cache: ReferenceCache,
    dataset: Any,
    name: str,
    *,
    collator: Callable[[list[Row]], PreferenceBatch],
    score: Callable[[PreferenceBatch], Tensor],
    batch_size: int,
    accelerator: Accelerator,
) -> None:
    """Computes the missing entries of a dataset, each process a part.

    Args:
        score: A batch -> (K * P, T - 1), reference log-probabilities, 0 outside the replies; P more rows at the end
            for the chosen ones under corrupted images.
    """
    cache.read()
    keys = dataset_keys(cache, dataset, name, accelerator)
    cache.check_data(name, (key for row_keys in keys for key in row_keys))
    lacking = [row for row, row_keys in enumerate(keys) if any(key not in cache.log_probs for key in row_keys)]
    # A process that reads later may find entries that another one has just written, and they would divide other rows.
    lacking = broadcast_object_list([lacking])[0]
    logger.info("Reference cache %s: %d of %d rows of %s to compute", cache.folder, len(lacking), len(keys), name)
    done: dict[str, Tensor] = {}
    for rows, is_own in _batches(lacking, batch_size, accelerator):
        batch = collator([dataset[row] for row in rows])
        log_probs = score(batch).float().cpu()
        if is_own:
            is_reply = batch["completion_mask"][:, 1:].bool()
            is_reply = torch.cat([is_reply, is_reply[: len(log_probs) - len(is_reply)]])  # under corrupted images
            done |= _by_key(log_probs, is_reply, [keys[row] for row in rows])
        if len(done) >= ROWS_PER_SHARD:
            cache.write(done)
            done = {}
    cache.write(done)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        cache.finish(name, (key for row_keys in keys for key in row_keys))
    accelerator.wait_for_everyone()
    cache.read()


def filled_for(trainer: "DPOTrainer", score: Callable[[nn.Module, PreferenceBatch], Tensor]) -> ReferenceCache:
    """The cache of a `DPOTrainer` in the folder that its arguments name, with all rows of its datasets.

    Args:
        trainer: Before training; its collator is in place.
        score: The reference model and a batch -> (K * P, T - 1), as for `fill`.
    """
    args = trainer.args
    settings = f"max_length={args.max_length} bf16={args.bf16} fp16={args.fp16}"
    reference = trainer.ref_model if trainer.ref_model is not None else trainer.model
    identity = model_identity(unwrapped(trainer.accelerator, reference))
    identity |= {"processor": processor_identity(trainer.processing_class), "settings": settings}
    assert args.reference_cache is not None
    collator = trainer.data_collator
    corruption = collator.corruption.description if isinstance(collator, ImagePairCollator) else None
    cache = ReferenceCache(args.reference_cache, identity, corruption)
    check_shared(cache.folder, trainer.accelerator)
    datasets = {"train": trainer.train_dataset}
    if trainer.eval_dataset is not None:
        evaluation = trainer.eval_dataset
        datasets |= evaluation if isinstance(evaluation, dict) else {"eval": evaluation}
    if trainer.ref_model is None and trainer.is_deepspeed_enabled:
        reference = _trl.prepare_deepspeed(trainer.model, trainer.accelerator)
    for name, dataset in datasets.items():
        fill(
            cache,
            dataset,
            name,
            collator=collator,
            score=lambda batch: score(reference, batch),
            batch_size=args.precompute_ref_batch_size or args.per_device_train_batch_size,
            accelerator=trainer.accelerator,
        )
    return cache


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of names, shapes, types and values, also of parameters that ZeRO-3 or FSDP2 has sharded."""
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters, key=lambda item: item[0]):
        with _whole(parameter):
            value = parameter.detach()
            value = (value.full_tensor() if isinstance(value, DTensor) else value).cpu().contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def model_identity(model: nn.Module) -> dict[str, str]:
    """What identifies the reference that a model is or holds: base weights, and the adapter `ref` if it has one."""
    base, adapter = [], []
    for name, parameter in model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
        if ".ref." in name:
            adapter.append((plain, parameter))
        elif ".default." not in name:
            base.append((plain, parameter))
    return {"model": fingerprint(base), "adapter": fingerprint(adapter) if adapter else "none"}


def processor_identity(processor: ProcessorMixin | PreTrainedTokenizerBase) -> str:
    """A hash of everything that a processor saves: vocabulary, chat template, image settings."""
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return _digest(part for path in files for part in (path.name.encode(), path.read_bytes()))


def _batches(rows: list[int], size: int, accelerator: Accelerator) -> Iterator[tuple[list[int], bool]]:
    """This process's batches; the last may be another's (False), so that all processes have the same number."""
    every = [rows[start : start + size] for start in range(0, len(rows), size)]
    for start in range(0, len(every), accelerator.num_processes):
        place = start + accelerator.process_index
        yield (every[place], True) if place < len(every) else (every[start], False)


def _by_key(log_probs: Tensor, is_reply: Tensor, keys: list[list[str]]) -> dict[str, Tensor]:
    return {
        key: log_probs[place, is_reply[place]]
        for row, row_keys in enumerate(keys)
        for place, key in zip(range(row, len(log_probs), len(keys)), row_keys, strict=True)
    }


def _whole(parameter: Tensor) -> Any:
    """A context in which a parameter has all its values."""
    # hasattr: DeepSpeed is optional and marks its parameters so.
    if not hasattr(parameter, "ds_id"):
        return torch.no_grad()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


def _digest(parts: Iterable[bytes | str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
