"""A hub that keeps what is uploaded in a folder, and may refuse: no test has a network."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import HfApi


class ScriptedHub:
    """Takes the place of the calls of `HfApi` that write.

    Args:
        root: Where uploads go.
        refuses: What it says instead of taking anything.
    """

    def __init__(self, root: Path, refuses: str = ""):
        self.root, self.refuses = root, refuses
        self.repositories: dict[str, dict[str, Any]] = {}
        self.uploads: list[dict[str, Any]] = []

    def install(self, monkeypatch) -> "ScriptedHub":
        monkeypatch.setattr(HfApi, "create_repo", lambda api, repo_id, **options: self.create(repo_id, options))
        monkeypatch.setattr(HfApi, "upload_folder", lambda api, **options: self.upload(options))
        return self

    def folder(self, repo: str) -> Path:
        return self.root / repo.replace("/", "--")

    def create(self, repo: str, options: dict[str, Any]) -> SimpleNamespace:
        if self.refuses:
            raise OSError(self.refuses)
        repo = repo if "/" in repo else f"me/{repo}"
        self.repositories[repo] = options
        return SimpleNamespace(repo_id=repo)

    def upload(self, options: dict[str, Any]) -> str:
        assert options["repo_id"] in self.repositories
        self.uploads.append(options)
        left_out = shutil.ignore_patterns(*options.get("ignore_patterns", ()))
        shutil.copytree(options["folder_path"], self.folder(options["repo_id"]), dirs_exist_ok=True, ignore=left_out)
        return f"https://hub.test/{options['repo_id']}"
