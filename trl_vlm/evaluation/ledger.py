"""Entries that survive a killed run: appended to one file per process, flushed, and read by the next run."""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from trl_vlm.data.io.atomic import write_whole

SETTINGS = "settings.json"
SECONDS_BETWEEN_SYNCS = 1.0


class Ledger:
    """Entries with an `id`, in `<name>.<process>.jsonl` of a folder.

    What was appended survives the death of its process; a sync every second at most guards it from that of the
    machine. An incomplete line of a killed process is dropped. The number of processes may change between runs. Of two
    entries with the same id the later one counts.

    Args:
        folder: Where the files lie.
        name: What they hold.
        process: Number of this process.
    """

    def __init__(self, folder: Path, name: str, process: int):
        self.folder, self.name = folder, name
        self.path = folder / f"{name}.{process:05}.jsonl"
        self._is_whole = False
        self._last_sync = -SECONDS_BETWEEN_SYNCS

    def entries(self, is_final: Callable[[Mapping[str, Any]], bool] = lambda entry: True) -> dict[str, dict[str, Any]]:
        """All whole entries of all processes, by id.

        Args:
            is_final: Whether an entry says what there is to say. One that does is never replaced by one that does not:
                the order of the files does not say which process asked again.
        """
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob(f"{self.name}.*.jsonl")):
            for line in _whole_lines(path.read_bytes()).splitlines():
                entry = _entry(line)
                if entry is not None and (
                    entry["id"] not in found or is_final(entry) or not is_final(found[entry["id"]])
                ):
                    found[entry["id"]] = entry
        return found

    def append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Adds entries; whoever reads the file from now on sees them."""
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        # Bytes, so that a reply with a lone surrogate is stored, too.
        data = lines.encode("utf-8", "backslashreplace")
        if not self._is_whole and self.path.exists():
            with open(self.path, "rb+") as file:  # without the incomplete line of a killed run
                file.truncate(len(_whole_lines(file.read())))
        self._is_whole = True
        with open(self.path, "ab") as file:
            file.write(data)
            file.flush()
            if time.monotonic() - self._last_sync >= SECONDS_BETWEEN_SYNCS:  # a sync waits for the disk
                os.fsync(file.fileno())
                self._last_sync = time.monotonic()


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Makes a folder for results with these settings, or continues one with the same.

    Raises:
        ValueError: It holds results with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / SETTINGS
    settings = json.loads(json.dumps(settings))
    earlier = None
    if file.is_file():
        try:
            earlier = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{str(file)!r} is not JSON ({error}). Delete the folder and evaluate again.") from error
        names = earlier.keys() | settings.keys()
        changed = sorted(name for name in names if earlier.get(name) != settings.get(name))
        if changed:
            raise ValueError(
                f"{str(folder)!r} holds replies with other settings ({', '.join(changed)}). Choose another output, or "
                "delete that folder."
            )
    if earlier is None:
        write_whole(file, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _whole_lines(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:  # a damaged line; its item is done again
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("id"), str) else None
