"""The snippet of docs/supervised.md that filters supervised rows by a reward model, as it stands there."""

import re
from pathlib import Path

import pytest
from datasets import load_dataset

from tests.data.converters.helpers import image_folder, llava_conversations
from tests.data.converters.test_conversion import write_json
from tests.rewards.helpers import save_reward_model
from trl_vlm.data.checks import check_dataset
from trl_vlm.data.converters import Source, convert
from trl_vlm.rewards import RewardModelReward

PAGE = Path(__file__).parents[2] / "docs" / "supervised.md"


@pytest.mark.slow
def test_the_documented_filter_keeps_the_rows_with_the_highest_scores(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "images", "000000333333.jpg")
    words = ["red", "dog", "bus on a street", "a cat and a dog"]
    records = [llava_conversations([{"from": "human", "value": "What?"}, {"from": "gpt", "value": w}]) for w in words]
    source = write_json(tmp_path / "in.json", records)
    convert("llava-conversations", source, "data/llava", images="images", progress=False)
    save_reward_model(tmp_path / "outputs" / "reward")
    snippet = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL).group(1)
    exec(snippet, {})
    kept = list(Source("data/llava-kept.parquet").records())
    assert check_dataset(kept, "sft").problems == []
    rows = load_dataset("data/llava", split="train")
    columns = {"prompts": rows["prompt"], "completions": rows["completion"], "images": rows["images"]}
    scores = RewardModelReward("outputs/reward")(**{name: list(column) for name, column in columns.items()})
    worst = min(range(4), key=lambda place: scores[place])
    assert [row["completion"] for row in kept] == [row["completion"] for n, row in enumerate(rows) if n != worst]
