"""The image side of preference: one more pair, of the chosen reply under two images, and the anchor."""

import math

import pytest
import torch
from accelerate.utils import DistributedType
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from tests.encoded_images import watched
from tests.families import FAMILIES, image, load_processor, saved
from tests.trainers.dpo.helpers import begin_epoch, largest_difference, logs, lora, losses, make, rows
from tests.trainers.dpo.sources import Greedy
from tests.trainers.dpo.test_averaged import OTHER, with_extra
from tests.trainers.dpo.test_pair_sources import instructions
from trl_vlm import DPOConfig, DPOTrainer
from trl_vlm.data.errors import RowError
from trl_vlm.data.images import load_image
from trl_vlm.maths.changed_tokens import changed_tokens
from trl_vlm.models.masked_images import draw_hidden, masked_inputs
from trl_vlm.models.reply_ends import with_reply_ends
from trl_vlm.pairs.draws import Draws
from trl_vlm.pairs.noise import distorted_images
from trl_vlm.trainers.dpo import setup

SHORT = {"max_steps": 3}
BETA, SEED = 0.1, 3
MDPO = {"image_weight": 1.0, "anchor_weight": 1.0, "image_corruption": "mask"}


def nightly(value):
    """A parameter that `make nightly` runs."""
    return pytest.param(value, marks=pytest.mark.nightly)


def data(images=(1, 2)):
    return rows(images)


def train(folder, dataset=None, **options):
    return make(DPOTrainer, DPOConfig, folder, data=data() if dataset is None else dataset, **{**SHORT, **options})


def other_model(family="llava"):
    return AutoModelForImageTextToText.from_pretrained(saved(family, seed=1, sharp=4.0))


def first_loss(folder, dataset=None, **options):
    trainer = train(folder, dataset, ref_model=other_model(), **options)
    with torch.no_grad():
        batch = trainer.data_collator([trainer.train_dataset[row] for row in range(len(trainer.train_dataset))])
        return trainer.compute_loss(trainer.model, batch).item(), metrics_of(trainer)


# An independent implementation: one row, one reply and one image at a time, from log-softmax over whole logits.


def log_probs(model, processor, row, side, images, hide=None):
    """Of each token of a reply."""
    batch = DataCollatorForVisionPreference(processor)([{**row, "images": images}])
    place, mask = ("chosen", "rejected").index(side), batch.pop("completion_mask")
    inputs = {
        name: value[place : place + 1] if value.shape == mask.shape else value[: len(value) // 2]
        for name, value in batch.items()
    }
    if hide is not None:
        hidden = draw_hidden(inputs["input_ids"], model.config, hide[0], [hide[1]])
        inputs = masked_inputs(model, inputs, hidden)
    with torch.no_grad():
        found = model(**inputs).logits.float().log_softmax(-1)[0, :-1]
    ids = inputs["input_ids"][0]
    return torch.stack([found[t - 1, ids[t]] for t in mask[place].nonzero().flatten().tolist()])


def reply_ids(processor, row, side):
    batch = DataCollatorForVisionPreference(processor)([dict(row)])
    place = ("chosen", "rejected").index(side)
    return batch["input_ids"][place][batch["completion_mask"][place].bool()].tolist()


def scores(policy, reference, processor, row, corruption, gamma=1.0):
    """D of the chosen reply, of the rejected one, and of the chosen one under the corrupted images."""
    images = [load_image(value, name="image") for value in row["images"]]
    row = {name: row[name] for name in ("prompt", "chosen", "rejected")} | {"images": images, "name": row["row_name"]}
    draws = Draws(SEED, 0, row.pop("name"))
    corrupted, hide = images, None
    if corruption == "noise":
        corrupted = distorted_images(images, 500, draws, indexing="code")
    elif corruption == "mask":
        hide = 0.5
    else:
        corrupted = corruption
    found = changed_tokens(*(reply_ids(processor, row, side) for side in ("chosen", "rejected")))
    weights = [torch.tensor([gamma if each else 1.0 for each in side]) for side in found]
    readings = (("chosen", images, None), ("rejected", images, None), ("chosen", corrupted, hide))
    totals = []
    for side, shown, ratio in readings:
        weight = weights[side == "rejected"]
        both = []
        for model in (policy, reference):
            mask = None if ratio is None else (ratio, draws.generator("mask"))
            both.append((weight * log_probs(model, processor, row, side, shown, mask)).sum())
        totals.append(both[0] - both[1])
    return totals


def metrics_of(trainer):
    """Of the mode that the model is in: as it was loaded, until it is trained."""
    return trainer._metrics["train" if trainer.model.training else "eval"]


def image_terms(family, corruption, dataset, gamma=1.0):
    policy = AutoModelForImageTextToText.from_pretrained(saved(family, sharp=4.0))
    processor = with_reply_ends(load_processor(family))
    named = [{**row, "row_name": f"train row {place}"} for place, row in enumerate(dataset)]
    each = [scores(policy, other_model(family), processor, row, corruption, gamma) for row in named]
    return (torch.stack(column) for column in zip(*each, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("corruption", ["mask", "noise"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_terms_are_those_of_an_independent_implementation(family, corruption, tmp_path):
    weights = {"image_weight": 0.7, "anchor_weight": 0.3, "anchor_value": 0.2, "image_seed": SEED}
    made = train(
        tmp_path,
        family=family,
        ref_model=other_model(family),
        image_corruption=corruption,
        image_mask_ratio=0.5,
        **weights,
    )
    with torch.no_grad():
        batch = made.data_collator([made.train_dataset[row] for row in range(2)])
        found = made.compute_loss(made.model, batch)
    logged = metrics_of(made)
    chosen, rejected, corrupted = image_terms(family, corruption, data())
    wanted = {
        "image/loss": -F.logsigmoid(BETA * (chosen - corrupted)).mean(),
        "anchor/loss": -F.logsigmoid(BETA * chosen - 0.2).mean(),
        "image/margin": BETA * (chosen - corrupted).mean(),
        "image/accuracy": (chosen > corrupted).float().mean(),
    }
    for name, value in wanted.items():
        assert logged[name][0] == pytest.approx(value.item(), rel=1e-5, abs=1e-5), name
    total = -F.logsigmoid(BETA * (chosen - rejected)).mean() + 0.7 * wanted["image/loss"] + 0.3 * wanted["anchor/loss"]
    assert_close(found, total, rtol=1e-5, atol=1e-5)
    assert (chosen - corrupted).abs().max() > 1e-3  # the image matters


def test_the_first_step_has_ln_2_in_every_term(tmp_path):
    entry = logs(train(tmp_path, **MDPO))[0]
    assert math.isclose(entry["image/loss"], math.log(2), abs_tol=1e-6)
    assert math.isclose(entry["anchor/loss"], math.log(2), abs_tol=1e-6)
    assert math.isclose(entry["loss"], 3 * math.log(2), abs_tol=1e-5)
    assert abs(entry["image/gain"]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"peft_config": lora}], ids=["full", "lora with dropout"])
def test_weight_0_changes_no_digit_with_the_metrics_and_without(options, tmp_path):
    def run(**more):
        given = {name: value() for name, value in options.items()}
        for config in given.values():
            config.lora_dropout = 0.5
        return logs(train(tmp_path, disable_dropout=False, **given, **more))

    plain = run()
    assert run(image_weight=0.0, anchor_weight=0.0) == plain
    watched = run(image_metrics=True, image_corruption="noise")
    assert all(len(entry) == len(other) + 4 for entry, other in zip(watched, plain, strict=True))
    assert [{name: entry[name] for name in other} for entry, other in zip(watched, plain, strict=True)] == plain


@pytest.mark.slow
@pytest.mark.parametrize("corruption", ["mask", nightly("noise"), nightly("crop"), "other"])
def test_training_makes_the_chosen_replies_likelier_under_their_own_images(corruption, tmp_path):
    options = {"max_steps": 8, "image_weight": 1.0, "image_seed": 0, "image_corruption": corruption}
    entries = logs(train(tmp_path, rows((1, 1, 1)), per_device_train_batch_size=3, **options))
    assert entries[0]["image/margin"] == pytest.approx(0, abs=1e-5)
    assert entries[-1]["image/margin"] > 0.05 and entries[-1]["image/accuracy"] == 1
    assert entries[-1]["image/loss"] < entries[0]["image/loss"]


def test_a_policy_that_ignores_the_image_is_at_chance(tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(saved("llava", sharp=4.0))
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.zero_()
    options = {"image_metrics": True, "image_corruption": "noise", "freeze_vision_tower": True, "share_prefix": False}
    trainer = train(tmp_path, model=model, ref_model=other_blind_model(), **options)
    with torch.no_grad():
        trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[row] for row in range(2)]))
    logged = metrics_of(trainer)
    assert logged["image/accuracy"] == [0.5] and logged["image/gain"] == [0.0] and logged["image/margin"] == [0.0]


def other_blind_model():
    model = other_model()
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.zero_()
    return model


def hand_computed(preset, policy, reference):
    """The loss of one pair from the sums of log-probabilities of (y+ | m), (y- | m), (y+ | m~)."""
    chosen, rejected, corrupted = (p - r for p, r in zip(policy, reference, strict=True))

    def term(difference):
        return math.log1p(math.exp(-0.1 * difference))

    return {
        "mdpo": term(chosen - rejected) + term(chosen - corrupted) + term(chosen),
        "chip": term(chosen - rejected + chosen - corrupted),
        "opa": term(chosen - rejected) + 0.2 * term(chosen - corrupted) + term(chosen),
    }[preset]


@pytest.mark.parametrize("preset", ["mdpo", "chip", "opa"])
def test_a_preset_gives_the_hand_computed_losses_of_two_pairs(preset, tmp_path, monkeypatch):
    """Each reply has two tokens, of these log-probabilities; every token is changed."""
    trainer = train(tmp_path, image_preset=preset, image_seed=SEED, share_prefix=False)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(2)])
    # policy and reference of (y+ | m), (y- | m), (y+ | m~), in nats per token, for two pairs
    policy = [(-1.0, -4.0, -3.0), (-2.0, -1.0, -2.5)]
    reference = [(-2.0, -3.0, -2.0), (-2.0, -2.0, -2.0)]

    def fake(values):
        def forward(**arguments):
            real = trainer.model(**arguments)
            is_reply = arguments["labels"][:, 1:] != -100
            if len(is_reply) == 4:
                nats = [values[0][0], values[1][0], values[0][1], values[1][1]]
            else:
                nats = [values[0][2], values[1][2]]
            each = torch.tensor(nats)[:, None] / is_reply.sum(1, keepdim=True) * 2
            real.log_probs = torch.where(is_reply, each.expand(is_reply.shape), 0.0)
            return real

        return forward

    monkeypatch.setattr(
        trainer, "_reference_log_probs", lambda model, arguments: fake(reference)(**arguments).log_probs
    )
    if preset == "chip":  # every token is changed, and weighs 4
        batch["changed_tokens"] = torch.ones_like(batch["changed_tokens"])
    factor = 4 if preset == "chip" else 1
    sums = [[[2 * factor * nats for nats in pair] for pair in model] for model in (policy, reference)]
    wanted = sum(hand_computed(preset, *pair) for pair in zip(*sums, strict=True)) / 2
    with torch.no_grad():
        found = trainer._compute_loss(fake(policy), batch, False)
    assert found.item() == pytest.approx(wanted, rel=1e-5)
    by_hand = {"mdpo": 1.8799, "chip": 0.4765, "opa": 1.4170}[preset]
    assert wanted == pytest.approx(by_hand, abs=1e-4)


@pytest.mark.slow
def test_chip_adds_dense_differences_inside_one_sigmoid(tmp_path):
    loss, logged = first_loss(tmp_path, image_preset="chip", image_seed=SEED)
    chosen, rejected, corrupted = image_terms("llava", "noise", data(), gamma=4.0)
    assert loss == pytest.approx((-F.logsigmoid(BETA * (2 * chosen - rejected - corrupted)).mean()).item(), rel=1e-4)
    # TRL's own metrics stay those of the two replies.
    assert logged["rewards/margins"][0] == pytest.approx(BETA * (chosen - rejected).mean().item(), rel=1e-3)
    assert logged["image/margin"][0] == pytest.approx(BETA * (chosen - corrupted).mean().item(), rel=1e-3)
    assert "image/loss" not in logged


@pytest.mark.slow
def test_the_metrics_of_trl_stay_those_of_the_replies(tmp_path):
    plain, watched = first_loss(tmp_path)[1], first_loss(tmp_path, **MDPO, image_seed=SEED)[1]
    for name, values in plain.items():
        assert watched[name] == values, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"dense_preset": "paper"},
        nightly({"dense_preset": "paper", "loss_type": ["ipo"]}),
        nightly({"peft_config": lora()}),
        {"extra": True, "rejected_weight": 0.7},
        nightly({"povid_loss": "shared"}),
        {"image_preset": "chip"},
    ],
    ids=["dense", "ipo", "lora", "averaged", "povid", "chip"],
)
def test_sharing_prefixes_changes_no_image_term(options, tmp_path):
    options = dict(options)
    dataset = with_extra(data(), OTHER) if options.pop("extra", False) else None
    options = ({} if "image_preset" in options else MDPO) | {"image_seed": SEED} | options
    found, wanted = (logs(train(tmp_path, dataset, share_prefix=share, **options)) for share in (True, False))
    difference, metric = largest_difference(found, wanted)
    assert difference < 1e-3, metric


@pytest.mark.slow
@pytest.mark.parametrize("corruption", ["mask", nightly("noise"), nightly("crop"), None])
def test_the_reference_cache_holds_what_is_fixed_by_the_row(corruption, tmp_path):
    dataset = data() if corruption else with_rejected_images()
    options = {"image_weight": 1.0, "anchor_weight": 0.5, "image_corruption": corruption, "image_seed": SEED}
    wanted = losses(train(tmp_path, dataset, **options))
    for _ in range(2):  # the second run computes nothing
        found = losses(train(tmp_path, dataset, reference_cache=tmp_path / "cache", **options))
        assert found == pytest.approx(wanted, rel=1e-5)
    made = train(tmp_path, dataset, reference_cache=tmp_path / "cache", **options)
    assert made.ref_model is None
    assert len(made.data_collator.reference.__self__.log_probs) == 6  # three to each of two rows


def with_rejected_images():
    dataset = data()
    mine = [[image(90 + row + place, 80, 60) for place in range(row + 1)] for row in range(2)]
    return dataset.add_column("rejected_images", [[encoded(each) for each in row] for row in mine])


def encoded(picture):
    import io

    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_rows_own_rejected_images_are_taken(family, tmp_path):
    """Of another size: Qwen gives them another number of tokens."""
    options = {"image_weight": 1.0, "ref_model": other_model(family), "family": family}
    trainer = train(tmp_path, with_rejected_images(), **options)
    with torch.no_grad():
        batch = trainer.data_collator([trainer.train_dataset[row] for row in range(2)])
        trainer.compute_loss(trainer.model, batch)
    processor = with_reply_ends(load_processor(family))
    policy, reference = (AutoModelForImageTextToText.from_pretrained(saved(family, sharp=4.0)), other_model(family))
    differences = []
    for place, row in enumerate(with_rejected_images()):
        own = [load_image(value, name="image") for value in row["rejected_images"]]
        chosen, _, corrupted = scores(policy, reference, processor, {**row, "row_name": str(place)}, own)
        differences.append(chosen - corrupted)
    assert_close(
        torch.tensor(metrics_of(trainer)["image/margin"][0]),
        BETA * torch.stack(differences).mean(),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.slow
def test_the_corruption_is_new_in_every_epoch_or_fixed_by_the_row(tmp_path):
    def pixels(epoch, **options):
        trainer = train(tmp_path, image_weight=1.0, image_corruption="noise", **options)
        for _ in range(epoch + 1):
            begin_epoch(trainer)
        torch.manual_seed(0)
        batch = trainer.data_collator([trainer.train_dataset[0]])
        drawn = torch.rand(1)
        torch.manual_seed(0)
        assert torch.equal(drawn, torch.rand(1))  # the collator leaves the generator as it is
        return batch["image_pair"]["pixel_values"]

    assert not torch.equal(pixels(0), pixels(1)) and not torch.equal(pixels(0), pixels(0, seed=1))
    assert torch.equal(pixels(1), pixels(1))
    assert torch.equal(pixels(0, image_seed=5), pixels(1, image_seed=5, seed=1))
    assert not torch.equal(pixels(0, image_seed=5), pixels(0, image_seed=6))


def test_other_takes_images_of_other_rows(tmp_path):
    trainer = train(tmp_path, rows((1, 1, 1)), image_weight=1.0, image_corruption="other")
    plain = [trainer.data_collator([trainer.train_dataset[row]])["pixel_values"][:1] for row in range(3)]
    for _ in range(4):
        begin_epoch(trainer)
        found = trainer.data_collator([trainer.train_dataset[0]])["image_pair"]["pixel_values"]
        assert any(torch.equal(found, other) for other in plain[1:]) and not torch.equal(found, plain[0])


def test_all_rows_with_one_image_have_no_other(tmp_path):
    dataset = rows((1, 1)).map(lambda row, index: {"images": rows((1, 1))[0]["images"]}, with_indices=True)
    trainer = train(tmp_path, dataset, image_weight=1.0, image_corruption="other")
    with pytest.raises(RowError, match="train row 0: 100 other rows .* held no other image"):
        trainer.data_collator([trainer.train_dataset[0]])


def test_a_row_without_an_image_is_named(tmp_path):
    trainer = train(tmp_path, rows((1, 0)), **MDPO)
    with pytest.raises(RowError, match="train row 1: it has no image, and `image_weight` compares two"):
        trainer.data_collator([trainer.train_dataset[row] for row in range(2)])


@pytest.mark.slow
def test_a_reply_that_another_image_would_cut_is_named(tmp_path):
    dataset = with_rejected_images().select([0])
    dataset = dataset.remove_columns("rejected_images").add_column("rejected_images", [[encoded(image(3, 400, 400))]])
    options = {"image_weight": 1.0, "family": "qwen2_5_vl"}
    collated = train(tmp_path, dataset, **options).data_collator([dataset[0]])
    length = int(collated["attention_mask"][0].sum())
    trainer = train(tmp_path, dataset, max_length=length, **options)
    with pytest.raises(RowError, match="train row 0: the chosen reply has .* tokens under its image and .* Raise"):
        trainer.data_collator([trainer.train_dataset[0]])


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1, 0], "train row 1, column 'rejected_images': it is empty. It must be a list of images"),
        ([1, 3], "train row 1, column 'rejected_images': .*3"),
    ],
)
def test_bad_rejected_images_are_named(counts, message, tmp_path):
    """Places in the prompt say how many images there must be; without places any number is put before the text."""
    parts = [
        [{"role": "user", "content": [{"type": "image"}] * count + [{"type": "text", "text": "What?"}]}]
        for count in (1, 2)
    ]
    dataset = data().remove_columns("prompt").add_column("prompt", parts)
    dataset = dataset.add_column("rejected_images", [[encoded(image(5))] * count for count in counts])
    trainer = train(tmp_path, dataset, image_weight=1.0)
    with pytest.raises(RowError, match=message):
        trainer.data_collator([trainer.train_dataset[row] for row in range(2)])


def test_an_image_pair_without_a_second_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs a second image for each row: set `image_corruption`, or give"):
        train(tmp_path, image_weight=1.0)
    with pytest.raises(ValueError, match="compares two images, and the rows have no column `images`"):
        train(tmp_path, data().remove_columns("images"), **MDPO)


@pytest.mark.slow
@pytest.mark.parametrize(("corruption", "images"), [("mask", 3), ("noise", 6)])
def test_a_frozen_tower_encodes_an_image_once_for_both_readings_of_both_models(corruption, images, tmp_path):
    options = {"image_weight": 1.0, "image_corruption": corruption, "image_seed": SEED, "max_steps": 1}
    runs = [
        train(tmp_path, peft_config=lora("language-model"), image_feature_cache=size, **options) for size in (1.0, 0.0)
    ]
    found = []
    for trainer in runs:
        with watched(trainer.model) as passes:
            found.append(losses(trainer))
        assert len(set(passes.rows())) == images
        assert (len(passes.rows()) == images) == (trainer is runs[0])
    assert found[0] == found[1]


@pytest.mark.slow
def test_pairs_that_a_source_makes_have_image_pairs_too(tmp_path):
    trainer = train(tmp_path, instructions((1, 2)), pair_source=Greedy(), **MDPO)
    entries = logs(trainer)
    assert entries[0]["image/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert entries[-1]["image/loss"] < entries[0]["image/loss"]


def test_reentrant_checkpointing_on_several_processes_is_refused(tmp_path, monkeypatch):
    trainer = train(tmp_path, gradient_checkpointing_kwargs={"use_reentrant": True}, **MDPO)
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", DistributedType.MULTI_CPU)
    with pytest.raises(ValueError, match="each of the two would send its own gradient .* Set `gradient_checkpointing"):
        setup.refuse_what_does_not_combine(trainer, 0, False, False)


@pytest.mark.slow
def test_evaluation_logs_the_image_metrics_too(tmp_path):
    trainer = train(tmp_path, eval_dataset=data(), image_metrics=True, image_corruption="crop")
    assert "eval_image/accuracy" in trainer.evaluate()


def test_a_custom_loss_reads_the_image_pair_too(tmp_path):
    seen = []

    def loss(chosen, rejected, reference_chosen, reference_rejected):
        seen.append((chosen - rejected).detach())
        return (chosen - rejected).square()

    assert len(losses(train(tmp_path, pair_loss=loss, max_steps=1, **MDPO))) == 1
    assert len(seen) == 2 and not torch.equal(*seen)
