import dataclasses
import json
import pickle
import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers import TrainingArguments as Arguments

from trl_vlm.models import last_complete_checkpoint
from trl_vlm.testbed import stream, supervised
from trl_vlm.testbed.datasets import SupervisedExample, supervised_example
from trl_vlm.testbed.model import build_model
from trl_vlm.testbed.sentences import COLORS
from trl_vlm.testbed.supervised import (
    CaptionTrainer,
    SupervisedCollator,
    SupervisedSettings,
    TowerTrainee,
    train_captions,
    train_supervised,
    train_tower,
)
from trl_vlm.testbed.world import World

SHORT = SupervisedSettings(
    tower_steps=3, tower_batch=4, steps=4, batch=4, warmup_steps=1, save_steps=2, logging_steps=2
)


class Killed(BaseException):
    """Stands for a signal: nothing may catch it."""


class Wrapped(torch.nn.Module):
    """As DistributedDataParallel, it has a forward and nothing else of the model's."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    return train_supervised(world, tmp_path_factory.mktemp("trained"), model_seed=1, settings=SHORT, progress=False)


def weights(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def changed_parts(model, before):
    after = model.state_dict()
    names = [name for name in before if not torch.equal(before[name], after[name])]
    return {part for part in ("vision_tower", "projector", "language_model") if any(part in name for name in names)}


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_folder_is_an_ordinary_checkpoint_with_processor_world_and_log(trained, world):
    model, processor = AutoModelForImageTextToText.from_pretrained(trained), AutoProcessor.from_pretrained(trained)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert processor.tokenizer.decode(processor.tokenizer("there is a cup .")["input_ids"]) == "there is a cup ."
    assert World.load(trained) == world
    summary = json.loads((trained / "supervised.json").read_text())
    assert summary["model_seed"] == 1
    assert summary["settings"] == dataclasses.asdict(SHORT)
    assert {"loss", "caption_loss", "question_loss"} <= summary["log"][0].keys()


def test_a_finished_folder_is_returned_as_it_is_and_never_overwritten(trained, world):
    written = (trained / "model.safetensors").stat().st_mtime_ns
    train_supervised(world, trained, model_seed=1, settings=SHORT, progress=False)
    assert (trained / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="differs in model_seed"):
        train_supervised(world, trained, model_seed=2, settings=SHORT, progress=False)
    with pytest.raises(ValueError, match="differs in world"):
        train_supervised(World(seed=9), trained, model_seed=1, settings=SHORT, progress=False)


def test_stopped_in_either_stage_it_resumes_to_the_same_weights(trained, world, tmp_path, monkeypatch):
    def stop_at(owner, name, call):
        original, calls = getattr(owner, name), []

        def stopping(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, stopping)

    for owner, name, call in ((TowerTrainee, "forward", 3), (CaptionTrainer, "compute_loss", 4)):
        stop_at(owner, name, call)
        with pytest.raises(Killed):
            train_supervised(world, tmp_path, model_seed=1, settings=SHORT, progress=False)
        monkeypatch.undo()
    # What a kill leaves that strikes while a checkpoint is written.
    (tmp_path / "training" / "captions" / "checkpoint-3").mkdir()
    drawn = []
    monkeypatch.setattr(
        stream, "supervised_example", lambda *args, **kw: drawn.append(args[2]) or supervised_example(*args, **kw)
    )
    monkeypatch.setattr(supervised, "cores", lambda: 1)  # or a worker would draw them
    train_supervised(world, tmp_path, model_seed=1, settings=SHORT, progress=False)
    assert min(drawn) == 2 * SHORT.batch  # it went on at the third step
    assert same(weights(tmp_path), weights(trained))


@pytest.mark.parametrize("cores", [1, 2])
def test_a_worker_on_a_second_core_draws_the_same_examples(cores, trained, world, tmp_path, monkeypatch):
    monkeypatch.setattr(supervised, "cores", lambda: cores)
    workers = []
    monkeypatch.setattr(
        supervised, "TrainingArguments", lambda **kw: workers.append(kw["dataloader_num_workers"]) or Arguments(**kw)
    )
    train_supervised(world, tmp_path, model_seed=1, settings=SHORT, progress=False)
    assert workers == [cores - 1] * 2
    assert same(weights(tmp_path), weights(trained))


def test_what_a_worker_draws_can_be_sent_to_a_process_of_any_kind(world, processor):
    """Newer Pythons do not fork: examples and collators are pickled."""
    for made, collate in (
        (stream.TowerPictures(world, 0), stream.TowerCollator(processor, [*world.kinds, "nothing"])),
        (stream.CaptionExamples(world, 0, 1, 0.25), SupervisedCollator(processor)),
    ):
        draw, put_together = pickle.loads(pickle.dumps((made, collate)))
        here, there = collate([made(0), made(1)]), put_together([draw(0), draw(1)])
        assert torch.equal(here["pixel_values"], there["pixel_values"])


def test_a_checkpoint_without_a_whole_state_file_is_passed_over(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    for step, text in ((2, "{}"), (10, "{}"), (11, '{"cut": ')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-12").mkdir()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_each_stage_trains_its_own_parts(world, model, processor, tmp_path):
    settings = dataclasses.replace(SHORT, tower_steps=1, steps=1)
    before = snapshot(model)
    train_tower(model, processor, world, tmp_path, 0, settings, progress=False)
    assert changed_parts(model, before) == {"vision_tower", "projector"}
    before = snapshot(model)
    train_captions(model, processor, world, tmp_path, 0, settings, progress=False)
    assert changed_parts(model, before) == {"projector", "language_model"}


def test_the_first_part_of_the_stream_is_exact_and_the_rest_biased(world, model, processor, tmp_path, monkeypatch):
    drawn = {}

    def spy(world, seed, index, *, biased, **shares):
        drawn[index] = biased
        return supervised_example(world, seed, index, biased=biased, **shares)

    monkeypatch.setattr(stream, "supervised_example", spy)
    monkeypatch.setattr(supervised, "cores", lambda: 1)  # or a worker would draw them
    train_captions(model, processor, world, tmp_path, 0, SHORT, progress=False)
    assert drawn == {index: index >= 8 for index in range(16)}  # 60 % of four steps, rounded: two steps of four


def test_the_towers_features_are_those_the_language_model_gets(world, model, processor):
    pixels = processor.image_processor([p.image for p in world.pictures(2, 0)], return_tensors="pt")["pixel_values"]
    expected = model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    torch.testing.assert_close(TowerTrainee(model, [10, 11]).features(pixels), torch.stack(list(expected)))


def test_the_towers_loss_by_its_definition(world, model, processor):
    pixels = processor.image_processor([p.image for p in world.pictures(2, 0)], return_tensors="pt")["pixel_values"]
    words, cells = [10, 20, 30], torch.randint(3, (2, 9), generator=torch.Generator().manual_seed(0))
    trainee = TowerTrainee(model, words)
    features, embeddings = trainee.features(pixels), model.get_input_embeddings().weight[words]
    power = (embeddings**2).mean()
    losses = []
    for row in range(2):
        for cell in range(9):
            feature, target = features[row, cell], cells[row, cell]
            scores = torch.stack([8 * (feature * word).sum() / (128 * power) for word in embeddings])
            nearness = ((feature - embeddings[target]) ** 2).mean() / power
            losses.append(-scores.log_softmax(0)[target] + 0.3 * nearness)
    torch.testing.assert_close(trainee(pixels, cells)["loss"], torch.stack(losses).mean())


def test_the_towers_loss_with_attributes_by_its_definition(model, processor):
    world = World(attributes=True)
    pictures = world.pictures(2, 0)
    batch = stream.TowerCollator(processor, [*world.kinds, "nothing"])(pictures)
    for row, picture in enumerate(pictures):
        for thing in picture.scene.objects:
            size, color, place = batch["attributes"][row, thing.cell].tolist()
            assert (("small", "large")[size], tuple(COLORS)[color], thing.cell % 3) == (thing.size, thing.color, place)
    assert (batch["attributes"] >= 0).all(-1).sum() == sum(len(picture.scene.objects) for picture in pictures)

    words = [list(range(10, 10 + len(world.kinds) + 1)), [30, 31], [32, 33, 34, 35], [36, 37, 38]]
    trainee = TowerTrainee(model, words[0], words[1:])
    features, table = trainee.features(batch["pixel_values"]), model.get_input_embeddings().weight
    power = (table[words[0]] ** 2).mean()
    losses, distances = [[] for _ in words], []
    for row in range(2):
        for cell in range(9):
            feature, target = features[row, cell], 0
            for group, which in enumerate([batch["cells"][row, cell], *batch["attributes"][row, cell]]):
                if which >= 0:
                    scores = torch.stack([8 * (feature * table[word]).sum() / (128 * power) for word in words[group]])
                    losses[group].append(-scores.log_softmax(0)[which])
                    target = target + table[words[group][which]]
            distances.append(((feature - target) ** 2).mean() / power)
    expected = sum(torch.stack(group).mean() for group in losses) + 0.3 * torch.stack(distances).mean()
    torch.testing.assert_close(trainee(**batch)["loss"], expected)


def test_hidden_cells_change_nothing_in_the_caption_they_are_hidden_from(world, model, processor):
    first, second, *_ = [supervised_example(world, 0, index, biased=False, facts_share=0) for index in range(2)]
    hidden = tuple(range(9))
    examples = [first._replace(hidden=hidden), second]
    batch = SupervisedCollator(processor)(examples)
    swapped = SupervisedCollator(processor)([examples[0]._replace(picture=second.picture), second])
    assert not torch.equal(batch["pixel_values"], swapped["pixel_values"])
    logits = []
    for each in (batch, swapped):
        read = {name: value for name, value in each["captions"].items() if name != "labels"}
        logits.append(model(**read, pixel_values=each["pixel_values"]).logits)
    is_reply = batch["captions"]["labels"] != -100
    torch.testing.assert_close(logits[0][0, is_reply[0]], logits[1][0, is_reply[0]])
    # What hides nothing is as in a batch without a mask.
    plain = SupervisedCollator(processor)([second])
    assert "attention_mask" not in plain["captions"]
    alone = model(input_ids=plain["captions"]["input_ids"], pixel_values=plain["pixel_values"]).logits
    torch.testing.assert_close(logits[0][1, is_reply[1]], alone[0, plain["captions"]["labels"][0] != -100])


def test_a_folder_made_before_an_option_came_in_has_its_default(trained, world, tmp_path):
    copy = tmp_path / "old"
    shutil.copytree(trained, copy)
    summary = json.loads((copy / "supervised.json").read_text())
    del summary["world"]["attributes"], summary["settings"]["hidden_share"]
    (copy / "supervised.json").write_text(json.dumps(summary))
    assert train_supervised(world, copy, model_seed=1, settings=SHORT, progress=False) == copy
    with pytest.raises(ValueError, match="differs in settings"):
        train_supervised(
            world, copy, model_seed=1, settings=dataclasses.replace(SHORT, hidden_share=0.5), progress=False
        )


def test_a_world_with_attributes_and_hidden_pictures_trains(tmp_path):
    world, settings = World(attributes=True), dataclasses.replace(SHORT, hidden_share=0.5)
    folder = train_supervised(world, tmp_path, settings=settings, progress=False)
    vocabulary = AutoProcessor.from_pretrained(folder).tokenizer.get_vocab()
    assert {"small", "blue", "middle"} <= vocabulary.keys()
    assert weights(folder)["model.language_model.embed_tokens.weight"].shape[0] == len(vocabulary)


def test_labels_lie_on_replies_alone(world, processor):
    examples = [supervised_example(world, 0, index, biased=False) for index in range(8)]
    assert any(example.facts for example in examples) and not all(example.facts for example in examples)
    batch = SupervisedCollator(processor)(examples)
    for row, example in enumerate(examples):
        for name, replies in (
            ("captions", [example.caption]),
            ("questions", [answer for _, answer in example.questions]),
        ):
            labels = batch[name]["labels"][row]
            assert processor.tokenizer.decode(labels[labels != -100]) == " <eos> ".join(replies) + " <eos>"
            real = batch[name]["input_ids"][row]
            assert torch.equal(labels[labels != -100], real[labels != -100])
    assert batch["pixel_values"].shape == (8, 3, 48, 48)


def test_the_loss_is_a_mean_over_captions_plus_a_mean_over_answers(world, model, processor, tmp_path):
    examples = [supervised_example(world, 0, index, biased=True) for index in range(3)]
    examples[0] = SupervisedExample(examples[0].picture, [], "there is a cup .", examples[0].questions[:2])
    batch = SupervisedCollator(processor)(examples)
    spoken, answers, ends = [], [], []
    for name in ("captions", "questions"):
        logits = model(input_ids=batch[name]["input_ids"], pixel_values=batch["pixel_values"]).logits
        for row, labels in enumerate(batch[name]["labels"].tolist()):
            for place, label in enumerate(labels):
                if label != -100:
                    loss = -logits[row, place - 1].log_softmax(-1)[label]
                    eos = label == processor.tokenizer.eos_token_id
                    (spoken if name == "captions" else ends if eos else answers).append(loss)
    assert len(answers) == len(ends) == 2 + 6 + 6
    expected = sum(spoken) / len(spoken) + sum(answers) / len(answers) + 0.05 * sum(ends) / len(answers)
    arguments = supervised._arguments(tmp_path, SHORT, steps=4, batch=4, progress=False)
    trainer = CaptionTrainer(model, arguments, train_dataset=[0], end_of_reply_weight=0.05)
    torch.testing.assert_close(trainer.compute_loss(Wrapped(model), batch), expected)


def test_a_batch_that_does_not_divide_over_the_processes_is_refused(world, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="4 pictures does not divide over 3 processes"):
        train_supervised(world, tmp_path, settings=SHORT, progress=False)


def test_another_model_seed_gives_another_start(processor):
    assert not same(build_model(processor, 0).state_dict(), build_model(processor, 1).state_dict())
