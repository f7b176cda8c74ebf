"""PPO's options under TRL's old and new names, and errors that name the row, the option or the function at fault."""

import math
from dataclasses import fields
from pathlib import Path

import pytest
from accelerate import Accelerator
from datasets import Dataset

from tests import families
from tests.trainers.ppo.helpers import count_letters, rollout, rows, settings
from trl_vlm import PPOConfig, PPOTrainer
from trl_vlm.trainers.ppo.config import FORMER_NAMES
from trl_vlm.trainers.ppo.rollout_rows import refuse_mixed_rows

# Options


def test_the_names_of_trls_last_ppo_trainer_are_accepted(tmp_path):
    args = settings(
        tmp_path,
        cliprange=0.3,
        num_ppo_epochs=3,
        response_length=7,
        max_completion_length=PPOConfig.max_completion_length,  # not set
        num_mini_batches=2,
        gradient_accumulation_steps=2,
        total_episodes=33,
        max_steps=-1,
        kl_coef=0.2,
        missing_eos_penalty=1.0,
        whiten_rewards=True,
    )
    assert (args.epsilon, args.num_iterations, args.max_completion_length) == (0.3, 3, 7)
    assert args.steps_per_generation == 4 and args.generation_batch_size == 8
    # 33 replies are 4 whole rollouts of 8, each trained on 3 times in 2 steps.
    assert args.max_steps == 4 * 3 * 2
    assert args.num_generations == 1 and type(args.num_generations) is int


def test_defaults_are_those_of_trls_last_ppo_config(tmp_path):
    args = PPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    expected = {
        "num_ppo_epochs": None,
        "num_iterations": 4,
        "num_mini_batches": 1,
        "kl_coef": 0.05,
        "kl_estimator": "k1",
        "epsilon": 0.2,
        "vf_coef": 0.1,
        "cliprange_value": 0.2,
        "gamma": 1.0,
        "lam": 0.95,
        "whiten_rewards": False,
        "missing_eos_penalty": None,
    }
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cliprange": 0.3, "epsilon": 0.1}, "`cliprange=0.3` and `epsilon=0.1` name the same thing"),
        ({"num_ppo_epochs": 2, "num_iterations": 3}, "`num_ppo_epochs=2` and `num_iterations=3` name the same"),
        ({"response_length": 9, "max_completion_length": 5}, "`response_length=9` and `max_completion_length=5`"),
        ({"beta": 0.1}, "`beta` is 0.1: it weighs GRPO's KL loss.* set `kl_coef` instead"),
        ({"kl_estimator": "k2"}, "`kl_estimator` is 'k2'; it must be one of k1, k3, clamped_k1"),
        ({"value_head_init": "random"}, "`value_head_init` is 'random'"),
        ({"gamma": 1.5}, "`gamma` is 1.5; it must lie between 0 and 1"),
        ({"lam": -0.1}, "`lam` is -0.1"),
        ({"kl_coef": -1.0}, "`kl_coef` is -1.0"),
        ({"num_generations": 0}, "`num_generations` is 0; it must be positive"),
        ({"cliprange_value": 0.0}, "`cliprange_value` is 0.0"),
        ({"kl_target": 0.1, "kl_coef": 0.0}, "`kl_target` steers `kl_coef`: both must be positive"),
        ({"missing_eos_penalty": -1.0}, "`missing_eos_penalty` is -1.0; it must not be negative: it is subtracted"),
        ({"num_mini_batches": 2, "steps_per_generation": 4}, "`num_mini_batches` sets the size of a rollout"),
        ({"scale_rewards": "batch"}, r"`scale_rewards='batch'` cannot be combined with PPO: .* PPO has no groups"),
        ({"scale_rewards": False}, "`scale_rewards=False` cannot be combined with PPO"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "`multi_objective_aggregation='norm.* cannot be"),
        *(({"loss_type": name}, f"`loss_type='{name}'` cannot be combined") for name in ("cispo", "luspo", "vespo")),
        ({"sync_ref_model": True}, "`sync_ref_model` moves the reference after the policy"),
    ],
)
def test_contradictions_are_refused_with_the_remedy(options, message, tmp_path):
    options = {"num_ppo_epochs": None, "max_completion_length": PPOConfig.max_completion_length, **options}
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **options)


@pytest.mark.parametrize("options", [{"scale_rewards": True}, {"scale_rewards": "group"}, {"loss_type": "bnpo"}])
def test_what_is_grpos_default_or_still_means_the_same_is_taken(options, tmp_path):
    assert settings(tmp_path, **options).vf_coef == 0.1


def test_options_of_trls_last_ppo_config_without_a_counterpart_name_the_page(tmp_path):
    with pytest.raises(TypeError, match=r"\['reward_model_path', 'sft_model_path'\] are options of TRL's last PPOCon"):
        settings(tmp_path, sft_model_path="policy", reward_model_path="reward")
    page = (Path(__file__).parents[3] / "docs" / "methods" / "ppo.md").read_text(encoding="utf-8")
    assert "## Moving over from TRL's last PPOTrainer" in page
    assert not [name for name in FORMER_NAMES if f"`{name}`" not in page]
    assert not FORMER_NAMES & {field.name for field in fields(PPOConfig)}
    with pytest.raises(TypeError, match="unexpected keyword argument 'kl_ceof'"):
        settings(tmp_path, kl_ceof=0.1)


def test_images_are_gathered_for_the_log_of_replies_alone(tmp_path):
    assert not settings(tmp_path).log_multimodal
    assert settings(tmp_path, log_completions=True).log_multimodal


def test_every_option_says_what_it_is():
    ours = {field.name for field in fields(PPOConfig)} - {field.name for field in fields(PPOConfig.__mro__[1])}
    described = [field for field in fields(PPOConfig) if field.name in ours]
    assert described and all(field.metadata.get("help") for field in described)


# Datasets


def make(tmp_path, dataset, reward=count_letters, **more):
    return PPOTrainer(
        str(families.saved("llava", sharp=3.0)),
        reward_funcs=reward,
        args=settings(tmp_path),
        train_dataset=dataset,
        **more,
    )


@pytest.mark.parametrize(
    "dataset, message",
    [
        (rows([1, 1]).rename_column("prompt", "question"), r"The train dataset lacks the column\(s\) \['prompt'\]"),
        (rows([1, 1]).select([]), "The train dataset is empty"),
        (rows([1]), "The train dataset has 1 rows, and one rollout takes 2 prompts"),
        (Dataset.from_list([{"prompt": []}] * 2), "train row 0, column 'prompt': the list of messages is empty"),
    ],
    ids=["column", "empty", "few", "prompt"],
)
def test_a_dataset_that_cannot_be_trained_on_is_refused_before_the_model_is_loaded(dataset, message, tmp_path):
    processor = families.load_processor("llava")
    with pytest.raises(ValueError, match=message):
        PPOTrainer("no/such/model", count_letters, settings(tmp_path), dataset, processing_class=processor)


def test_an_evaluation_set_is_checked_as_well(tmp_path):
    with pytest.raises(ValueError, match="The hard dataset is empty"):
        make(tmp_path, rows([1, 1]), eval_dataset={"easy": rows([1]), "hard": rows([1]).select([])})


def test_ppo_without_any_reward_is_refused(tmp_path):
    with pytest.raises(ValueError, match="PPO has no reward: pass `reward_funcs`, `reward_model`, or both"):
        make(tmp_path, rows([1, 1]), reward=None)


def test_a_policy_made_in_memory_needs_its_processor(tmp_path):
    model, _ = families.build("llava")
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration that was made in memory.*`processing_class`"):
        PPOTrainer(model, count_letters, settings(tmp_path), rows([1, 1]))


# Rollouts


@pytest.fixture(scope="module")
def answers():
    """What the reward function returns next, made from the replies."""
    return {"give": None}


@pytest.fixture(scope="module")
def trainer(answers, tmp_path_factory):
    def reward(completions, **columns):
        return answers["give"](completions)

    return make(tmp_path_factory.mktemp("out"), rows([1, 1]), reward)


@pytest.mark.parametrize(
    "give, message",
    [
        (lambda replies: [1.0, math.nan], r"the reward function `reward` returned nan for train row 1 \(reply"),
        (lambda replies: [math.inf, 1.0], r"`reward` returned inf for train row 0"),
        (lambda replies: [1.0], "`reward` returned 1 values for 2 replies"),
        (lambda replies: [None, 1.0], "1 of 2 replies have no reward: .* for reply 0 of the rollout"),
    ],
    ids=["nan", "infinite", "count", "none"],
)
def test_a_reward_that_is_none_stops_the_run(give, message, trainer, answers):
    answers["give"] = give
    with pytest.raises(ValueError, match=message):
        rollout(trainer, [0, 1])


def changed(**columns):
    """The two rows of a rollout, the second one changed."""
    first, second = ({**row, "row_name": f"train row {i}"} for i, row in enumerate(rows([1, 1])))
    return [first, {**second, **columns}]


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"images": [b""]}, "train row 1, image 0"),
        ({"images": ["no/such/file.png"]}, "train row 1, image 0"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}]},
            r"train row 1: the row has 1 image\(s\), and its prompt has places for 2",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]},
            r"train row 1: the row has 1 image\(s\), and its prompt has places for 0",
        ),
        (
            {"prompt": [{"role": "user", "content": "<image>\nWhat?"}]},
            "train row 1, column 'prompt': the user's text has a literal <image>, which is read as one more image",
        ),
        ({"image": families.image()}, "train row 1: both 'images' and 'image' are filled"),
    ],
    ids=["empty file", "no file", "placeholders", "no placeholder", "image token", "two columns"],
)
def test_a_row_that_cannot_be_shown_to_the_policy_is_named(columns, message, trainer):
    with pytest.raises((ValueError, OSError), match=message):
        trainer._generate_and_score_completions(changed(**columns))


def test_under_deepspeed_and_fsdp_rows_with_and_without_images_do_not_mix(trainer, monkeypatch):
    some, none, every = ([{"images": [0] * count} for count in counts] for counts in ([1, 0], [0, 0], [1, 2]))
    refuse_mixed_rows(some, trainer)
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    refuse_mixed_rows(some, trainer)
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    refuse_mixed_rows(none, trainer)
    refuse_mixed_rows(every, trainer)
    with pytest.raises(RuntimeError, match="1 of the 2 rows of a rollout have images.*under DDP"):
        refuse_mixed_rows(some, trainer)


def test_messages_in_parts_may_come_from_arrow_which_fills_in_empty_keys(trainer, answers):
    answers["give"] = count_letters
    parts = [{"type": "image", "text": None, "image": None}, {"type": "text", "text": "What?", "image": None}]
    trainer.model.train()
    batch = trainer._generate_and_score_completions(changed(prompt=[{"role": "user", "content": parts}]))
    assert batch["num_images"] == [1, 1]


def test_a_single_image_column_and_a_streamed_dataset_train(tmp_path):
    single = [{"prompt": row["prompt"], "image": row["images"][0]} for row in rows([1, 1, 1, 1])]
    trainer = make(tmp_path, Dataset.from_list(single).to_iterable_dataset())
    trainer.train()
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history[:2])


def test_prompts_may_be_strings_as_in_grpo(tmp_path):
    seen = []

    def lengths(prompts, completions, **columns):
        seen.append((prompts, completions))
        return [float(len(completion)) for completion in completions]

    trainer = make(tmp_path, Dataset.from_list([{"prompt": "A red square on"}, {"prompt": "A blue circle."}]), lengths)
    trainer.train()
    assert len(trainer.state.log_history) > 2
    assert all(isinstance(text, str) for prompts, completions in seen for text in (*prompts, *completions))
