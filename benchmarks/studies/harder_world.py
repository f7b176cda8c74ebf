# /// script
# dependencies = ["trl-vlm[bdhs,eval]"]
# ///
"""What the three papers claim, asked in a harder small world: attributes or long replies, a language prior, an
annotator who notices one error of a reply and re-words what is right.

    python -m benchmarks.studies.harder_world --seeds 0 1 2 --arms sft dpo dense_spans
    python -m benchmarks.studies.harder_world --world long --seeds 0 1 2

Each seed is a world, a supervised model from scratch, and rows of its own. Every arm has the same number of tuning
cells (`--cells`: learning rate and anchor; for PPO learning rate and KL). Of the cells whose recall on a development
split is at most a point below the supervised model's, the one that says the least that is untrue is kept, and measured
once on fresh scenes: arms are compared at matched recall. What is done is not done again: an interrupted call goes on
where it was, and further seeds or arms are added by naming them. After each arm `harder_world_<world>.md` and `.json`
are written into `--results_dir`. The labeler of PPO's rewards sees kinds and no attributes: ask about facts with
`--world long`.
"""

import argparse
import json
import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import ModelConfig

from benchmarks.studies import preference_study
from benchmarks.studies.harder_world_arms import ARMS, CELLS, COMPARISONS, START, TITLES, Arm, Cell, chosen
from benchmarks.studies.harder_world_measures import answers, captions, fraction, paired, values
from benchmarks.studies.harder_world_report import page
from trl_vlm import PPOConfig, PPOTrainer, RewardConfig, RewardTrainer
from trl_vlm.judges import RewardJudge
from trl_vlm.pairs import BDHS, DatasetPairs, Judged, MixedPairs, Policy, SelfSamples
from trl_vlm.rewards import FactRLHFReward, RewardModelReward
from trl_vlm.scripts.evaluation import load_for_replies
from trl_vlm.scripts.run_folder import RunFolder, write_json
from trl_vlm.testbed.annotator import Annotator
from trl_vlm.testbed.datasets import caption_rows, correction_rows, preference_rows, prompt_rows
from trl_vlm.testbed.evaluate import caption_sampler
from trl_vlm.testbed.oracle import count_reply, object_overlap, truth_reward
from trl_vlm.testbed.prior import language_prior
from trl_vlm.testbed.processor import JUDGE_TEMPLATE
from trl_vlm.testbed.sentences import statements
from trl_vlm.testbed.stages import WeakEyes
from trl_vlm.testbed.supervised import SupervisedSettings, train_supervised
from trl_vlm.testbed.world import Split, World, weaken_vision

WORLDS: dict[str, dict[str, Any]] = {
    "attributes": {"attributes": True},
    "long": {"min_anchors": 3, "pairs": 6, "neutral_kinds": 5},
}
SUPERVISED = SupervisedSettings(hidden_share=0.3, tower_steps=400, steps=500)
QUICK_SUPERVISED = SupervisedSettings(hidden_share=0.3, tower_steps=10, tower_batch=16, steps=30, batch=8)
ANNOTATOR = Annotator(noticed=1, reworded=1.0)
MEASURED: tuple[tuple[Split, bool], ...] = (("adv", True), ("adv", False), ("balanced", True))


class Seed(preference_study.Study):
    """One seed: its world, its supervised model, its rows, and its arms.

    Args:
        options: Of the command line.
        seed: Of the world, the model, the rows and the training.
    """

    def __init__(self, options: argparse.Namespace, seed: int):
        values = preference_study.TESTBED | (preference_study.QUICK if options.quick else {})
        root = options.output_dir / options.world / f"seed{seed}"
        filled = preference_study.Options(
            output_dir=str(root), seed=seed, world_seed=seed, quick=options.quick, **values
        )
        filled.generation_batch = 32  # pyright: ignore[reportAttributeAccessIssue] - read by `Study.pairs`
        super().__init__("Harder world", filled, ModelConfig(dtype="float32"), {})
        self.world = World(seed=seed, **WORLDS[options.world])
        self.seed, self.quick, self.cells = seed, options.quick, options.cells

    def supervised_model(self) -> str:
        settings = QUICK_SUPERVISED if self.quick else SUPERVISED
        seeds = {"model_seed": self.seed, "data_seed": self.seed}
        return str(train_supervised(self.world, self.root / "supervised", settings=settings, progress=False, **seeds))

    def prior(self) -> dict[str, float]:
        """What the supervised model says while the image is hidden."""
        path = self.root / "prior.json"
        if not path.exists():
            count = 10 if self.quick else 200
            model, processor = load_for_replies(self.supervised_model())
            write_json(path, language_prior(model, processor, self.world, count=count, seed=900 + self.seed))
        return json.loads(path.read_text())

    # Rows

    @cached_property
    def marked_corrections(self) -> Dataset:
        path = self.root / "corrections.parquet"
        if not path.exists():
            sample = self.sampler()
            rows = correction_rows(self.world, self.options.pairs, 100 * self.seed + 41, sample, annotator=ANNOTATOR)
            rows.to_parquet(path)
        return Dataset.from_parquet(str(path))

    @cached_property
    def corrections(self) -> Dataset:
        return self.marked_corrections.remove_columns(["chosen_spans", "rejected_spans"])

    @cached_property
    def self_samples(self) -> Dataset:
        return self.made("self", SelfSamples(**self.sampling))

    @cached_property
    def noise_pairs(self) -> Dataset:
        return self.made("noise", BDHS(self.gate, mask_ratio=0.0, noise_steps=500, **self.sampling))

    @cached_property
    def unguided_pairs(self) -> Dataset:
        return self.made("unguided", BDHS(self.gate, mask_ratio=0.95, guided=False, **self.sampling))

    @cached_property
    def masked_pairs(self) -> Dataset:
        return self.made("masked", BDHS(self.gate, mask_ratio=0.95, **self.sampling))

    @cached_property
    def labeled(self) -> Dataset:
        """Two of the supervised model's replies to each picture, ranked by a labeler who errs, with facts."""
        path = self.root / "rankings.parquet"
        if not path.exists():
            preference_rows(self.world, 3 * self.options.pairs, 100 * self.seed + 11, self.sampler()).to_parquet(path)
        return Dataset.from_parquet(str(path))

    @property
    def rankings(self) -> Dataset:
        return self.labeled.remove_columns("facts")

    @property
    def few_corrections(self) -> Dataset:
        return self.corrections.select(range(self.options.pairs // 4))

    @cached_property
    def prompts(self) -> Dataset:
        return prompt_rows(self.world, self.options.pairs, 100 * self.seed + 61).remove_columns("facts")

    @cached_property
    def judged_pairs(self) -> Dataset:
        """Pairs as the arm `online` makes them, but of the supervised model's replies."""
        return self.pairs("judged", self.judged, self.prompts, batch_size=64)

    def judged(self) -> Judged:
        return Judged(RewardJudge(truth_reward), **self.sampling)

    @property
    def gate(self) -> Any:
        """Where sentences have attributes, replies that name the same objects may differ in them."""
        return _same_statements if self.world.attributes else object_overlap

    @property
    def sampling(self) -> dict[str, int]:
        return {"max_new_tokens": self.world.max_caption_tokens, "seed": self.seed}

    def made(self, name: str, source: Any) -> Dataset:
        """Pairs that a source makes of exact captions."""
        rows = caption_rows(self.world, self.options.pairs, 100 * self.seed + 51)
        return self.pairs(name, lambda: source, rows)

    def sampler(self) -> Any:
        model, processor = load_for_replies(self.supervised_model())
        return caption_sampler(model, processor, max_new_tokens=self.world.max_caption_tokens)

    # Arms

    def result(self, name: str) -> tuple[Cell, dict[str, Any]]:
        """Trains the cells of an arm, chooses one at matched recall on the development split, measures it."""
        arm = ARMS[name]
        folders = {cell: self.trained(name, arm, cell) for cell in arm.cells[: self.cells]}
        recall = fraction(self.measured(self.supervised_model(), "development"), "recall")
        scores = {cell: self.measured(folder, "development") for cell, folder in folders.items()}
        cell = chosen({cell: (fraction(s, "untrue"), fraction(s, "recall")) for cell, s in scores.items()}, recall)
        return cell, self.measured(folders[cell], "test")

    def folder_of(self, name: str, cell: Cell) -> Path:
        return self.root / f"{name}_{cell.rate:g}_{cell.weight:g}"

    def earlier(self, arms: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """What earlier calls measured of arms, where it is still there."""
        paths = {name: self.folder_of(name, Cell(*arm["cell"])) / "measured_test.json" for name, arm in arms.items()}
        return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}

    def chosen_replies(self) -> dict[str, dict[str, float]]:
        """What the corrected replies themselves invent: training on them alone ends there at best."""
        replies = (row[-1]["content"] for row in self.corrections["chosen"])
        counts = [count_reply(*pair) for pair in zip(replies, self.corrections["objects"], strict=True)]
        terms = [[each.hallucinated_mentions for each in counts], [each.mentions for each in counts]]
        return values({"adv, sampled": {}, "adv, greedy": {}, "balanced, sampled": {"chair_i": terms}})

    def trained(self, name: str, arm: Arm, cell: Cell) -> str:
        folder = RunFolder(self.folder_of(name, cell), self.settings | {"cell": list(cell)})
        if not folder.is_done:
            if isinstance(arm.rows, float):
                folder.train(self.ppo(name, arm, arm.rows, cell, folder.path))
            else:
                losses = {arm.loss: 1.0} | ({"sft": cell.weight} if cell.weight else {})
                rows, source = getattr(self, arm.rows), {}
                if arm.online:
                    offline = 1 - arm.online
                    mixed = MixedPairs(DatasetPairs(), self.judged(), probability=offline, seed=self.seed)
                    source = {"pair_source": mixed if offline else self.judged()}
                folder.train(self.trainer(rows, cell.rate, folder.path, losses, **source, **arm.config))
        return str(folder.path)

    def reward_model(self, name: str, noise: float, use_facts: bool) -> str:
        """The reward model that all cells of an arm of PPO share: it sees through noise."""
        folder = RunFolder(self.root / f"reward_{name}", self.settings)
        if not folder.is_done:
            args = RewardConfig(
                str(folder.path),
                use_facts=use_facts,
                learning_rate=5e-4,
                lr_scheduler_type="cosine",
                max_steps=4 if self.quick else 200,
                per_device_train_batch_size=8 if self.quick else 32,
                mean_reward_coefficient=1e-3,
                warmup_steps=10,
                **self.machine,
            )
            model, rows = self.supervised_model(), weakened(self.labeled, noise)
            folder.train(RewardTrainer(model=model, args=args, train_dataset=rows, judge_template=JUDGE_TEMPLATE))
        return str(folder.path)

    def ppo(self, name: str, arm: Arm, noise: float, cell: Cell, folder: Path) -> PPOTrainer:
        """PPO with a reward model that sees through noise, as in `examples/fact_rlhf.py`."""
        use_facts, limit = arm.config["use_facts"], self.world.max_caption_tokens
        reward_model = self.reward_model(name, noise, use_facts)
        prompts = prompt_rows(self.world, 3 * self.options.pairs, 100 * self.seed + 13)
        processor = load_for_replies(self.supervised_model())[1]
        reward = FactRLHFReward(
            WeakEyes(RewardModelReward(reward_model, batch_size=64), noise),
            eos_token_ids=processor.tokenizer.eos_token_id,
            missing_eos_penalty=2.0,
            length_coefficient=4.0,
            max_tokens=limit,
        )
        args = PPOConfig(
            str(folder),
            learning_rate=cell.rate,
            kl_coef=cell.weight,
            max_steps=4 if self.quick else 60,
            per_device_train_batch_size=8 if self.quick else 64,
            num_mini_batches=2,
            num_ppo_epochs=2,
            vf_coef=0.5,
            cliprange_value=5.0,
            temperature=1.0,
            top_k=0,
            max_completion_length=limit,
            warmup_steps=4,
            **self.machine,
        )
        return PPOTrainer(
            self.supervised_model(),
            reward_funcs=reward,
            args=args,
            train_dataset=prompts if use_facts else prompts.remove_columns("facts"),
            processing_class=processor,
            value_model=reward_model,
        )

    @property
    def machine(self) -> dict[str, Any]:
        """What the reward model and PPO have in common."""
        return {
            "adam_beta2": 0.98,
            "seed": self.seed,
            "freeze_vision_tower": True,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "report_to": "none",
            "bf16": False,
            "use_cpu": not torch.cuda.is_available(),
        }

    # Measures

    def measured(self, folder: str, split: str) -> dict[str, Any]:
        """Terms of ratios over the scenes of the "development" or the "test" split; kept beside the model."""
        path = Path(folder) / f"measured_{split}.json"
        if not path.exists():
            scenes = {"development": (200, 7700), "test": (300, 4400)}[split]
            count, seed = (20 if self.quick else scenes[0]), scenes[1] + self.seed
            policy = Policy(*load_for_replies(folder))
            terms = {
                f"{place}, {'sampled' if sample else 'greedy'}": captions(
                    policy, self.world, place, count, seed, sample
                )
                for place, sample in (MEASURED if split == "test" else MEASURED[:1])
            }
            if split == "test":
                terms["questions"] = answers(policy, self.world, count // 3, seed)
            write_json(path, terms)
        return json.loads(path.read_text())


def weakened(rows: Dataset, noise: float) -> Dataset:
    """Rows as `preference_rows(vision_noise=noise)` has them: the labels are the same whatever the noise."""
    if not noise:
        return rows
    return rows.map(lambda row: {"images": [weaken_vision(image, noise) for image in row["images"]]})


def _same_statements(texts: list[str], others: list[str]) -> list[float]:
    """The gate of BDHS with attributes: 1 where two replies say the same, else 0."""
    pairs = zip(texts, others, strict=True)
    return [float(set(statements(text)) == set(statements(other))) for text, other in pairs]


def compare(found: Mapping[str, Any], terms: Mapping[str, Any]) -> None:
    """Sets the differences of arms that were tuned as much: with the same number of cells.

    Args:
        found: One seed's results.
        terms: What was measured of the supervised model and of its arms.
    """
    for reference, others in COMPARISONS.values():
        for other in [arm for arm in others if arm in terms and reference in terms]:
            cells = {found["arms"][arm]["cells"] for arm in (reference, other) if arm != START}
            name = f"{other} - {reference}"
            found["differences"].pop(name, None)
            if len(cells) == 1:
                found["differences"][name] = paired(terms[reference], terms[other])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=WORLDS, default="attributes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--cells", type=int, choices=range(1, len(CELLS) + 1), default=len(CELLS))
    parser.add_argument("--quick", action="store_true", help="A few rows and steps of everything: for tests.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/harder_world"), help="Models of the runs.")
    parser.add_argument("--results_dir", type=Path, default=Path("docs/results"), help="Where the tables go.")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    path = options.results_dir / f"harder_world_{options.world}.json"
    options.results_dir.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for number in options.seeds:
        seed = Seed(options, number)
        found = results.setdefault(str(number), {"arms": {}, "differences": {}})
        found |= {"prior": seed.prior(), "supervised": values(seed.measured(seed.supervised_model(), "test"))}
        terms = {START: seed.measured(seed.supervised_model(), "test")} | seed.earlier(found["arms"])
        for name in options.arms:
            cell, terms[name] = seed.result(name)
            found["arms"][name] = {"cells": options.cells, "cell": list(cell), "values": values(terms[name])}
            if ARMS[name].rows in ("corrections", "marked_corrections"):
                found["chosen"] = seed.chosen_replies()
            compare(found, terms)
            path.write_text(json.dumps(results, indent=1) + "\n")
            path.with_suffix(".md").write_text(page(options.world, results, TITLES, COMPARISONS))


if __name__ == "__main__":
    main()
