"""Answers that were paid for once, on disk."""

import json
import os
import threading
from pathlib import Path


class AnswerCache:
    """A folder with one small file per answer, written whole or not at all, so that several processes may share it.

    Args:
        folder: Made if need be.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)

    def get(self, key: str) -> str | None:
        """The answer kept under `key` (a hexadecimal digest), or None."""
        try:
            return json.loads(self._file(key).read_text(encoding="utf-8"))["answer"]
        except FileNotFoundError:
            return None

    def put(self, key: str, answer: str, model: str) -> None:
        """Keeps an answer."""
        file = self._file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
        unfinished.write_text(json.dumps({"model": model, "answer": answer}, ensure_ascii=False), encoding="utf-8")
        os.replace(unfinished, file)

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
