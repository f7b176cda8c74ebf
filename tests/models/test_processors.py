import pytest
import torch
import transformers
from torch.testing import assert_close
from transformers.utils import is_torchvision_available

from tests.families import FAMILIES, batch, build, image, load_processor, saved
from trl_vlm.models.processors import trainable_processor


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_processor_loads_and_does_the_same(family):
    _, built = build(family)
    loaded = load_processor(saved(family))
    assert type(loaded).__name__ == type(built).__name__
    for rows in ([1, 2, 0], [0, 0]):
        before, after = batch(built, rows), batch(loaded, rows)
        assert before.keys() == after.keys()
        if "pixel_values" in before and is_torchvision_available():
            # The folder loads with torchvision's image processor, which resizes noise a little differently.
            pixels, others = before.pop("pixel_values"), after.pop("pixel_values")
            assert pixels.shape == others.shape and (pixels - others).abs().mean() < 0.05
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.skipif(is_torchvision_available(), reason="with torchvision the processor loads in full")
def test_settings_of_a_video_processor_survive_a_machine_without_torchvision(tmp_path):
    import json

    processor = load_processor("qwen2_vl")
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    assert "video_processor" not in settings
    settings["video_processor"] = {"video_processor_type": "Qwen2VLVideoProcessor", "max_frames": 3}
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    load_processor(tmp_path).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "processor_config.json").read_text()) == settings


@pytest.mark.skipif(is_torchvision_available(), reason="with torchvision the processor loads in full")
def test_the_video_part_may_stand_anywhere_among_the_arguments(tmp_path):
    """LLaVA-NeXT-Video's processor takes it first."""
    given = load_processor("llava_next")
    processor_class = trainable_processor(transformers.LlavaNextVideoProcessor)
    processor = processor_class(
        image_processor=given.image_processor, tokenizer=given.tokenizer, chat_template=given.chat_template
    )
    assert processor.tokenizer is given.tokenizer
    processor.save_pretrained(tmp_path)
    loaded = load_processor(tmp_path)
    assert isinstance(loaded, transformers.LlavaNextVideoProcessor)
    assert type(loaded.image_processor) is type(given.image_processor)


class TestPaliGemma:
    @staticmethod
    def encode(processor, texts, images=None):
        return processor(text=texts, images=images, padding=True, return_tensors="pt", add_special_tokens=False)

    def test_rows_with_images_are_laid_out_as_upstream_does(self):
        ours = load_processor("paligemma")
        stock = transformers.PaliGemmaProcessor.from_pretrained(saved("paligemma"))
        texts, images = ["<image>What is it?", "<image><image>A cat."], [[image(0)], [image(1), image(2)]]
        ours_rows, stock_rows = self.encode(ours, texts, images), self.encode(stock, texts, images)
        stock_rows.pop("labels")
        assert ours_rows.keys() == stock_rows.keys()
        assert all(torch.equal(ours_rows[key], stock_rows[key]) for key in ours_rows)

    def test_a_row_without_an_image_is_the_same_in_any_batch(self):
        """The stock class refuses it alone, and puts a token into the middle of it beside a row with an image."""
        processor = load_processor("paligemma")
        alone = self.encode(processor, ["There is a dog."])
        beside = self.encode(processor, ["There is a dog.", "<image>What is it?"], [[], [image(0)]])
        real = beside["attention_mask"][0].bool()
        assert torch.equal(beside["input_ids"][0, real], alone["input_ids"][0])
        assert torch.equal(beside["token_type_ids"][0, real], alone["token_type_ids"][0])
        assert processor.decode(alone["input_ids"][0]) == "There is a dog."

    def test_a_reply_does_not_see_its_own_future(self):
        """Prompt and reply are tokenised apart and joined, as TRL's collators do."""
        model, processor = build("paligemma", sharp=4.0)
        prompt = self.encode(processor, ["<image>What is it?"], [[image(0)]])
        logits = []
        for reply in ("A red cat.", "A red dog."):
            part = self.encode(processor, [reply])
            keys = ("input_ids", "attention_mask", "token_type_ids")
            joined = {key: torch.cat([prompt[key], part[key]], dim=1) for key in keys}
            with torch.no_grad():
                logits.append(model(**joined, pixel_values=prompt["pixel_values"]).logits)
            same = prompt["input_ids"].shape[1] + 2
        assert_close(logits[0][:, :same], logits[1][:, :same], atol=1e-6, rtol=0)
        assert not torch.allclose(logits[0][:, -1], logits[1][:, -1], atol=1e-3)

    def test_a_suffix_still_gives_labels(self):
        rows = load_processor("paligemma")(text="<image>What is it?", images=image(0), suffix="A cat.")
        assert {"labels", "token_type_ids"} <= rows.keys()
        assert 0 < sum(label != -100 for label in rows["labels"][0]) < len(rows["labels"][0])
