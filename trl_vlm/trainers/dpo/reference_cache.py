"""Reference log-probabilities on disk: computed once, for image data too, and never stale in silence.

A folder holds `manifest.json`, which says what the numbers were computed with, and shards of log-probabilities per
reply token, found by a hash of images, prompt and reply. Per token, so that every loss and every weighting of Dense
DPO can use one cache. Shards appear whole or not at all, so a run that is killed goes on where it stopped.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from trl_vlm.trainers import _trl
from trl_vlm.trainers.dpo.collator import PreferenceCollator, Row

logger = logging.getLogger(__name__)

FORMAT = "1"
MANIFEST = "manifest.json"
ROWS_PER_SHARD = 512


class ReferenceCache:
    """Log-probabilities of replies, by key.

    Args:
        folder: made if it is not there.
        identity: what the numbers depend on, by name; all values must equal those of the folder.

    Raises:
        ValueError: the folder was made with something else; the message says what.
    """

    def __init__(self, folder: str | Path, identity: dict[str, str]):
        self.folder = Path(folder)
        self.identity = {"format": FORMAT, **identity}
        self.log_probs: dict[str, Tensor] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / MANIFEST).exists():
            # Before any shard, so that those of a run that is killed are not taken for another model's.
            self._write_manifest({})
        made_with = self._manifest()["identity"]
        changed = [name for name, value in self.identity.items() if made_with.get(name) != value]
        if changed:
            raise ValueError(
                f"The reference cache {self.folder} was made with another {', '.join(changed)}. Its numbers do not "
                "belong to this run. Choose another `reference_cache`, or delete the folder to compute it anew."
            )

    def read(self) -> None:
        """Load every shard."""
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
        """Add a shard: first under another name, then renamed, which file systems do at once."""
        if not log_probs:
            return
        values = [value.float().cpu() for value in log_probs.values()]
        tensors = {"log_probs": torch.cat(values), "lengths": torch.tensor([len(value) for value in values])}
        name = hashlib.sha256("".join(log_probs).encode()).hexdigest()[:32]
        unfinished = self.folder / f"{name}.{os.getpid()}.tmp"
        save_file(tensors, unfinished, metadata={"keys": json.dumps(list(log_probs))})
        _rename(unfinished, self.folder / f"{name}.safetensors")

    def finish(self, name: str, keys: Iterable[str]) -> None:
        """Note in the manifest that the dataset `name` with exactly these replies is complete."""
        self._write_manifest(self._manifest()["complete"] | {name: _digest(sorted(keys))})

    def check_data(self, name: str, keys: Iterable[str]) -> None:
        """Refuse a dataset whose rows are not those that the folder was completed for."""
        keys = list(keys)
        known = self._manifest()["complete"].get(name)
        if known is not None and known != _digest(sorted(keys)):
            missing = sum(key not in self.log_probs for key in keys)
            raise ValueError(
                f"The reference cache {self.folder} was made for other {name} data: {missing} of {len(keys)} replies "
                "are not in it. Choose another `reference_cache`, or delete the folder to compute it anew."
            )

    def of_row(self, row: Row) -> list[Tensor]:
        """The log-probabilities of each reply of a row, as the collator asks for them."""
        keys = reply_keys(row)
        missing = [key for key in keys if key not in self.log_probs]
        if missing:
            raise ValueError(
                f"The reference cache {self.folder} does not hold {len(missing)} of the {len(keys)} replies of a row. "
                "Data that were not given to the trainer at its construction are not cached; pass them as "
                "`train_dataset` or `eval_dataset`."
            )
        return [self.log_probs[key] for key in keys]

    def _write_manifest(self, complete: dict[str, str]) -> None:
        unfinished = self.folder / f"{MANIFEST}.{os.getpid()}.tmp"
        unfinished.write_text(json.dumps({"identity": self.identity, "complete": complete}, indent=2))
        _rename(unfinished, self.folder / MANIFEST)

    def _manifest(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / MANIFEST).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.folder / MANIFEST} is damaged ({error}). Delete the folder.") from error


def reply_keys(row: Row) -> list[str]:
    """A key for each reply of a row as a collator sees it: the chosen one, the rejected one, the extra ones."""
    if "prompt_ids" in row:
        prompt = row["prompt_ids"]
        replies = [row["chosen_ids"], row["rejected_ids"], *row.get("rejected_extra_ids", ())]
    else:
        settings = [row.get(name) for name in ("tools", "chat_template_kwargs")]
        prompt = [[image_digest(image) for image in row.get("images") or ()], row["prompt"], settings]
        replies = [row["chosen"], row["rejected"], *(row.get("rejected_extra") or ())]
    start = hashlib.sha256(json.dumps(prompt, default=image_digest).encode())
    keys = []
    for reply in replies:
        key = start.copy()
        key.update(json.dumps(reply).encode())
        keys.append(key.hexdigest())
    return keys


def image_digest(image: Any) -> str:
    """A hash of an image's pixels."""
    if hasattr(image, "tobytes") and hasattr(image, "size"):  # PIL images and arrays
        return _digest([str(image.size).encode(), str(getattr(image, "mode", None)).encode(), image.tobytes()])
    raise TypeError(f"An image came as {type(image).__name__}, and its pixels cannot be hashed. Pass PIL images.")


def fill(
    cache: ReferenceCache,
    dataset: Any,
    name: str,
    *,
    collator: PreferenceCollator,
    score: Callable[[dict[str, Tensor]], Tensor],
    batch_size: int,
    accelerator: Accelerator,
    workers: int = 0,
) -> None:
    """Compute what the cache lacks of a dataset, each process its share.

    Args:
        score: a batch -> (K * P, T - 1), reference log-probabilities, 0 outside the replies.
    """
    cache.read()
    loader = DataLoader(dataset, batch_size=64, num_workers=workers, collate_fn=_Keys(collator))
    keys = [row_keys for batch in loader for row_keys in batch]
    cache.check_data(name, (key for row_keys in keys for key in row_keys))
    lacking = [row for row, row_keys in enumerate(keys) if any(key not in cache.log_probs for key in row_keys)]
    # A process that reads later may find what another one has written by now, and they would share out other rows.
    lacking = broadcast_object_list([lacking])[0]
    logger.info("Reference cache %s: %d of %d rows of %s to compute", cache.folder, len(lacking), len(keys), name)
    done: dict[str, Tensor] = {}
    for rows, is_own in _batches(lacking, batch_size, accelerator):
        batch = collator([dataset[row] for row in rows])
        log_probs = score(batch).float().cpu()
        if is_own:
            done |= _by_key(log_probs, batch["completion_mask"][:, 1:].bool(), [keys[row] for row in rows])
        if len(done) >= ROWS_PER_SHARD:
            cache.write(done)
            done = {}
    cache.write(done)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        cache.finish(name, (key for row_keys in keys for key in row_keys))
    accelerator.wait_for_everyone()
    cache.read()


def filled_for(trainer: Any, score: Callable[[nn.Module, dict[str, Tensor]], Tensor]) -> ReferenceCache:
    """The cache of a `DPOTrainer` in the folder that its arguments name, with all rows of its datasets.

    Args:
        trainer: before training; its collator is in place.
        score: the reference model and a batch -> (K * P, T - 1), as for `fill`.
    """
    args = trainer.args
    settings = f"max_length={args.max_length} bf16={args.bf16} fp16={args.fp16}"
    reference = trainer.ref_model if trainer.ref_model is not None else trainer.model
    identity = model_identity(trainer.accelerator.unwrap_model(reference))
    identity |= {"processor": processor_identity(trainer.processing_class), "settings": settings}
    cache = ReferenceCache(args.reference_cache, identity)
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
            collator=trainer.data_collator,
            score=lambda batch: score(reference, batch),
            batch_size=args.precompute_ref_batch_size or args.per_device_train_batch_size,
            accelerator=trainer.accelerator,
            workers=args.dataloader_num_workers,
        )
    return cache


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of names, shapes, types and values, also of parameters that ZeRO-3 has spread over processes."""
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters, key=lambda item: item[0]):
        with _whole(parameter):
            value = parameter.detach().cpu().contiguous()
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


class _Keys:
    """Collates rows to their keys, in a worker."""

    def __init__(self, collator: PreferenceCollator):
        self.collator = collator

    def __call__(self, rows: list[Row]) -> list[list[str]]:
        return [reply_keys(self.collator.loaded(row)) for row in rows]


def _batches(rows: list[int], size: int, accelerator: Accelerator) -> Iterator[tuple[list[int], bool]]:
    """This process's batches. All processes get equally many, as sharded models need; a surplus one is not its own."""
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


def _rename(unfinished: Path, path: Path) -> None:
    """Put a file in its place once its bytes are on the disk."""
    with open(unfinished, "rb") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)
