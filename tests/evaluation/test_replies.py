import pytest
import torch

from tests.families import build, image
from trl_vlm.evaluation import generate_replies

ROWS = [
    {"prompt": [{"role": "user", "content": "What is it? " * (1 + 3 * place)}], "images": images}
    for place, images in enumerate([[image(0)], [], [image(1)], [image(2), image(3)]])
]


@pytest.fixture(scope="module")
def qwen():
    return build("qwen2_5_vl", sharp=4.0)


def said(model_and_processor, rows=ROWS, **options):
    return generate_replies(*model_and_processor, rows, max_new_tokens=6, progress=False, **options)


def test_batching_and_padding_change_no_greedy_reply(qwen):
    alone = [said(qwen, [row])[0] for row in ROWS]
    assert len(set(alone)) > 1
    assert said(qwen, batch_size=4) == said(qwen, batch_size=3) == alone


def test_samples_follow_their_seed_and_torchs_generator_stays(qwen):
    state = torch.get_rng_state()
    assert said(qwen, seed=1) == said(qwen, seed=1) != said(qwen, seed=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_repetition_penalty_of_the_checkpoint_changes_no_reply(qwen):
    model, _ = qwen
    before = said(qwen)
    model.generation_config.repetition_penalty = 10.0
    try:
        assert said(qwen) == before
    finally:
        model.generation_config.repetition_penalty = None


def test_the_model_trains_on_as_before(qwen):
    model, _ = qwen
    model.train()
    said(qwen, ROWS[:1])
    assert model.training and all(module.training for module in model.modules())
    model.eval()


def test_a_row_whose_images_do_not_match_is_named(qwen):
    bad = {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}], "images": []}
    with pytest.raises(ValueError, match="row 1"):
        said(qwen, [ROWS[0], bad])
