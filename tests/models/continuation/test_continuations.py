"""The fast sampler gives what one call of `generate` per job gives, with prompt and kept tokens written out."""

import pytest
import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, TaskType, get_peft_model
from torch.testing import assert_close

from tests.families import FAMILIES, batch, build
from trl_vlm.models.continuation.continuations import Continuation, Continuations, why_not_continuable
from trl_vlm.models.image_tokens import image_token_mask
from trl_vlm.models.masked_images import draw_hidden, masked_inputs
from trl_vlm.models.sampling import GumbelSampler

STEPS = 6
REPLIES = [[110, 120, 30, 140, 50, 160, 70], [133, 44, 155, 66]]
JOBS = [
    Continuation(1, 4),
    Continuation(0, 3, [99, 81]),
    Continuation(0, 0),
    Continuation(1, 2, [77]),
    Continuation(0, 7),
]


def setup(family, images=(1, 2), sharp=8):
    model, processor = build(family, sharp=sharp)
    rows = batch(processor, list(images), padding_side="left", size=(60, 60))
    rows.pop("labels", None)
    return model, rows


def hidden_of(model, rows, share, seed=0):
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(rows["input_ids"]))]
    return draw_hidden(rows["input_ids"], model.config, share, generators)


def written_out(model, rows, hidden, context):
    """The batch with `context` behind each prompt, as `generate` reads it, and the mask for it."""
    tail = torch.tensor([context] * len(hidden), dtype=torch.long).view(len(hidden), -1)
    values = {"attention_mask": 1, "mm_token_type_ids": 0, "token_type_ids": 0}
    if model.config.model_type == "paligemma":
        values["token_type_ids"] = 1  # replies are read causally
    longer = {
        name: torch.cat([rows[name], torch.full_like(tail, value)], 1)
        for name, value in values.items()
        if name in rows
    }
    inputs = {**rows, **longer, "input_ids": torch.cat([rows["input_ids"], tail], dim=1)}
    return masked_inputs(model, inputs, torch.cat([hidden, torch.zeros_like(tail, dtype=torch.bool)], dim=1))


def of_two_arguments(sampler):
    """`generate` gives a logits processor with a third argument beams alone."""
    return lambda input_ids, scores: sampler(input_ids, scores)


def plain_loop(model, rows, hidden, jobs, replies=REPLIES, steps=STEPS, samplers=None):
    """New tokens and logits of each job, by one call of `generate` each."""
    tokens, logits = [], []
    for number, job in enumerate(jobs):
        inputs = written_out(model, rows, hidden, [*replies[job.row][: job.prefix_length], *job.forced_tokens])
        output = model.generate(
            **inputs,
            max_new_tokens=steps,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            logits_processor=[of_two_arguments(samplers[number])] if samplers else [],
        )
        new = output.sequences[job.row, inputs["input_ids"].size(1) :].tolist()
        ends = model.generation_config.eos_token_id
        end = next((place for place, token in enumerate(new, start=1) if token == ends), len(new))
        tokens.append(new[:end])
        logits.append(torch.stack(output.logits)[:end, job.row])
    return tokens, logits


class Recorder:
    """A sampler that changes nothing, and keeps what each job saw."""

    def __init__(self, jobs):
        self.logits = [[] for _ in jobs]

    def __call__(self, input_ids, scores, sequences):
        for job, row in zip(sequences, scores, strict=True):
            self.logits[job].append(row)
        return scores


def layer_inputs(model):
    """What the first layer of the language model gets, call by call: a list of shapes that fills up."""
    shapes = []
    text = next(module for name, module in model.named_modules() if name.endswith(("language_model", "text_model")))
    text.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple((args or tuple(kwargs.values()))[0].shape[:2])), with_kwargs=True
    )
    return shapes


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return setup(request.param)


class TestEveryFamily:
    @pytest.mark.parametrize("share", [0.5, 1.0])
    def test_greedy_jobs_are_those_of_a_plain_loop(self, family, share):
        model, rows = family
        hidden = hidden_of(model, rows, share)
        wanted, wanted_logits = plain_loop(model, rows, hidden, JOBS)
        recorder = Recorder(JOBS)
        found = Continuations(model, rows, REPLIES).run(hidden, JOBS, max_new_tokens=STEPS, sampler=recorder)
        assert found == wanted
        for logits, expected in zip(recorder.logits, wanted_logits, strict=True):
            assert_close(torch.stack(logits), expected, rtol=0, atol=1e-4)
        _, unmasked = plain_loop(model, rows, torch.zeros_like(hidden), JOBS[2:3])
        assert (unmasked[0][0] - wanted_logits[2][0]).abs().max() > 1e-2  # hiding matters

    def test_the_vision_tower_runs_once_for_all_calls(self, family):
        model, rows = family
        name = next(
            name for name, _ in model.named_modules() if name.endswith(("vision_tower", "vision_model", "visual"))
        )
        calls = []
        hook = model.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
        continuations = Continuations(model, rows, REPLIES)
        for seed in range(3):
            continuations.run(hidden_of(model, rows, 0.5, seed), JOBS, max_new_tokens=2)
        hook.remove()
        assert len(calls) == 1


@pytest.mark.parametrize("family", ["gemma4", "qwen3_vl_moe", "llava_onevision", "paligemma2"])
def test_more_families_continue_as_in_a_plain_loop(family):
    windowed = family == "paligemma2"
    model, rows = setup(family, images=(1, 1) if windowed else (1, 2))
    jobs = [job for job in JOBS if job.prefix_length or not windowed]
    for share in (0.0, 0.6):
        hidden = hidden_of(model, rows, share)
        wanted, wanted_logits = plain_loop(model, rows, hidden, jobs)
        recorder = Recorder(jobs)
        found = Continuations(model, rows, REPLIES).run(hidden, jobs, max_new_tokens=STEPS, sampler=recorder)
        assert found == wanted
        for logits, expected in zip(recorder.logits, wanted_logits, strict=True):
            assert_close(torch.stack(logits), expected, rtol=0, atol=1e-4)


def test_a_prompt_that_sees_all_of_itself_is_whole_also_where_no_job_keeps_a_token():
    model, rows = setup("paligemma", images=(1, 1))
    hidden, jobs = hidden_of(model, rows, 0.5), [Continuation(0, 0), Continuation(1, 0)]
    wanted, wanted_logits = plain_loop(model, rows, hidden, jobs)
    recorder = Recorder(jobs)
    assert Continuations(model, rows, REPLIES).run(hidden, jobs, max_new_tokens=STEPS, sampler=recorder) == wanted
    for logits, expected in zip(recorder.logits, wanted_logits, strict=True):
        assert_close(torch.stack(logits), expected, rtol=0, atol=1e-4)


def test_a_window_that_such_a_prompt_overrides_is_refused_from_the_start_of_a_reply_alone():
    model, rows = setup("paligemma2", images=(1, 1))
    hidden = hidden_of(model, rows, 0.5)
    continuations = Continuations(model, rows, REPLIES)
    with pytest.raises(ValueError, match="continuation 1 keeps nothing of the reply of row 0: .* window of 16 tokens"):
        continuations.run(hidden, [Continuation(1, 1), Continuation(0, 0)], max_new_tokens=2)
    model.config.get_text_config().sliding_window = 1000
    assert len(continuations.run(hidden, [Continuation(0, 0)], max_new_tokens=2)) == 1


def test_a_hybrid_model_is_refused():
    model, rows = setup("qwen3_5")
    with pytest.raises(ValueError, match="layers of type linear_attention keep no keys that could be cut"):
        Continuations(model, rows, REPLIES)


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen3_vl"])
def test_padding_on_the_right_and_rows_without_images_are_no_different(family):
    model, rows = setup(family, images=(2, 0))
    hidden = image_token_mask(rows["input_ids"], model.config)
    wanted, _ = plain_loop(model, rows, hidden, JOBS)
    assert Continuations(model, rows, REPLIES).run(hidden, JOBS, max_new_tokens=STEPS) == wanted
    _, processor = build(family)
    right = batch(processor, [2, 0], padding_side="right", size=(60, 60))
    hidden = image_token_mask(right["input_ids"], model.config)
    assert Continuations(model, right, REPLIES).run(hidden, JOBS, max_new_tokens=STEPS) == wanted


def narrow_mistral(model):
    """LLaVA on Mistral, every layer of which has one narrow window."""
    text = model.config.get_text_config()
    config = transformers.MistralConfig(**{**text.to_dict(), "sliding_window": 12, "model_type": "mistral"})
    config._attn_implementation = "sdpa"
    model.config.text_config = config
    torch.manual_seed(0)
    model.model.language_model = transformers.MistralModel(config).eval()
    for parameter in model.model.language_model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_windows_narrower_than_the_sequences_keep_their_reach(family):
    model, rows = setup(family)
    if family == "llava":
        narrow_mistral(model)
    shapes = layer_inputs(model)
    hidden = hidden_of(model, rows, 0.5)
    wanted, wanted_logits = plain_loop(model, rows, hidden, JOBS)
    shapes.clear()
    recorder = Recorder(JOBS)
    found = Continuations(model, rows, REPLIES).run(hidden, JOBS, max_new_tokens=STEPS, sampler=recorder)
    assert found == wanted
    assert_close(torch.stack(recorder.logits[4]), wanted_logits[4], rtol=0, atol=1e-4)
    ends = rows["attention_mask"].sum(1) + torch.tensor([7, 4]) - 1
    assert shapes[0] == (2, ends.max())  # hidden tokens stayed


def test_hidden_tokens_are_left_out_where_windows_are_wide():
    model, rows = setup("gemma3")
    model.config.get_text_config().sliding_window = 1000
    hidden = hidden_of(model, rows, 0.5)
    wanted, _ = plain_loop(model, rows, hidden, JOBS)
    shapes = layer_inputs(model)
    assert Continuations(model, rows, REPLIES).run(hidden, JOBS, max_new_tokens=STEPS) == wanted
    ends = rows["attention_mask"].sum(1) - hidden.sum(1) + torch.tensor([7, 4]) - 1
    assert shapes[0] == (2, ends.max())


def test_one_prefill_per_call_and_rows_without_a_job_cost_nothing():
    model, rows = setup("llava", images=(1, 2))
    shapes = layer_inputs(model)
    continuations = Continuations(model, rows, REPLIES)
    hidden = hidden_of(model, rows, 1.0)
    continuations.run(hidden, JOBS, max_new_tokens=3)
    prompts = rows["attention_mask"].sum(1) - hidden.sum(1)
    # Jobs 1 and 3 have two forced tokens and one: they need as many steps more.
    assert shapes == [(2, max(prompts[0] + 6, prompts[1] + 3)), (5, 1), (5, 1), (5, 1), (2, 1), (1, 1)]
    shapes.clear()
    continuations.run(hidden, [Continuation(1, 0)], max_new_tokens=1)
    assert shapes == [(1, prompts[1] - 1), (1, 1)]
    assert continuations.run(hidden, [], max_new_tokens=3) == []


def test_a_job_is_the_same_alone_and_among_others():
    model, rows = setup("llava")
    hidden = hidden_of(model, rows, 0.5)
    continuations = Continuations(model, rows, REPLIES)
    together = continuations.run(hidden, JOBS, max_new_tokens=STEPS)
    assert together == [continuations.run(hidden, [job], max_new_tokens=STEPS)[0] for job in JOBS]
    assert together == continuations.run(hidden, JOBS, max_new_tokens=STEPS)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "paligemma"])
def test_a_limit_of_memory_splits_jobs_and_changes_no_token(family):
    model, rows = setup(family)
    hidden = hidden_of(model, rows, 0.5)
    continuations = Continuations(model, rows, REPLIES)
    options = {"max_new_tokens": STEPS, "stop": lambda job, tokens: len(tokens) == job + 2}
    wanted = continuations.run(hidden, JOBS, sampler=GumbelSampler(range(5)), **options)
    shapes = layer_inputs(model)
    for most, at_once in ((1, 1), (None, 5)):
        shapes.clear()
        sampler = GumbelSampler(range(5))
        assert continuations.run(hidden, JOBS, sampler=sampler, max_cache_bytes=most, **options) == wanted
        assert max(count for count, length in shapes if length == 1) == at_once


def test_a_limit_of_memory_holds_for_the_keys_and_values_of_rows_and_jobs_together():
    model, rows = setup("llava")
    hidden = hidden_of(model, rows, 0.5)
    jobs = [Continuation(number % 2, 1 + number % 4) for number in range(12)]
    continuations, text = Continuations(model, rows, REPLIES), model.config.text_config
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    shapes = layer_inputs(model)
    limits = [token * tokens for tokens in (100, 300, 600)]
    at_once = []
    for limit in limits:
        shapes.clear()
        continuations.run(hidden, jobs, max_new_tokens=STEPS, max_cache_bytes=limit)
        prefills = [shape for shape in shapes if shape[1] > 1]
        steps = [count for count, length in shapes if length == 1]
        at_once.append(max(steps))
        held = [count * (width + STEPS + 1) for count in steps for _, width in prefills[:1]]
        assert max(held) * token <= limit or max(steps) == 1
    assert at_once == sorted(at_once) and at_once[0] < at_once[-1] <= 12


def test_sampled_jobs_are_those_of_generate_with_the_same_noise():
    model, rows = setup("llava", sharp=4)
    hidden = hidden_of(model, rows, 0.5)
    seeds = list(range(len(JOBS)))
    # `generate` samples all rows of a batch; the noise of both is that of the job.
    samplers = [GumbelSampler([seed, seed], temperature=1.5) for seed in seeds]
    wanted, _ = plain_loop(model, rows, hidden, JOBS, samplers=samplers)
    sampler = GumbelSampler(seeds, temperature=1.5)
    found = Continuations(model, rows, REPLIES).run(hidden, JOBS, max_new_tokens=STEPS, sampler=sampler)
    assert found == wanted
    assert found != plain_loop(model, rows, hidden, JOBS)[0]


def test_an_end_of_sequence_ends_its_job_alone():
    model, rows = setup("qwen2_5_vl")
    hidden = hidden_of(model, rows, 0.5)
    free = Continuations(model, rows, REPLIES).run(hidden, JOBS, max_new_tokens=STEPS)
    model.generation_config.eos_token_id = free[2][1]
    wanted, _ = plain_loop(model, rows, hidden, JOBS)
    assert len(wanted[2]) < STEPS == max(map(len, wanted))
    assert Continuations(model, rows, REPLIES).run(hidden, JOBS, max_new_tokens=STEPS) == wanted
    model.generation_config.eos_token_id = [0, free[2][1]]
    assert Continuations(model, rows, REPLIES).run(hidden, JOBS, max_new_tokens=STEPS) == wanted


def test_stop_ends_a_job_after_the_token_that_it_was_asked_about():
    model, rows = setup("llava")
    hidden = hidden_of(model, rows, 0.5)
    continuations = Continuations(model, rows, REPLIES)
    free = continuations.run(hidden, JOBS, max_new_tokens=STEPS)
    asked = []

    def stop(job, tokens):
        asked.append((job, list(tokens)))
        return len(tokens) == job + 1

    found = continuations.run(hidden, JOBS, max_new_tokens=STEPS, stop=stop)
    assert found == [tokens[: job + 1] for job, tokens in enumerate(free)]
    assert sorted(asked) == sorted((job, free[job][: count + 1]) for job in range(5) for count in range(job + 1))


def test_adapters_take_part_and_bfloat16_works():
    model, rows = setup("llava_next")
    hidden = hidden_of(model, rows, 0.5)
    plain = Continuations(model, rows, REPLIES).run(hidden, JOBS, max_new_tokens=STEPS)
    torch.manual_seed(0)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    wanted, _ = plain_loop(peft, rows, hidden, JOBS)
    assert Continuations(peft, rows, REPLIES).run(hidden, JOBS, max_new_tokens=STEPS) == wanted != plain
    peft.bfloat16()
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in rows.items()}
    wanted, _ = plain_loop(peft, half, hidden, JOBS)
    assert Continuations(peft, half, REPLIES).run(hidden, JOBS, max_new_tokens=STEPS) == wanted


class TestRefusals:
    def test_jobs_must_fit_their_rows(self):
        model, rows = setup("llava")
        continuations = Continuations(model, rows, REPLIES)
        hidden = hidden_of(model, rows, 0.5)
        with pytest.raises(ValueError, match="continuation 1 is of row 2; there are 2 rows"):
            continuations.run(hidden, [Continuation(0, 0), Continuation(2, 0)], max_new_tokens=1)
        with pytest.raises(ValueError, match="continuation 0 keeps 5 tokens of the reply of row 1, which has 4"):
            continuations.run(hidden, [Continuation(1, 5)], max_new_tokens=1)
        with pytest.raises(ValueError, match=r"`hidden` is \(2, 3\)"):
            continuations.run(hidden[:, :3], [Continuation(1, 0)], max_new_tokens=1)
        with pytest.raises(ValueError, match="`hidden` is True at token .* no image token"):
            continuations.run(~hidden, [Continuation(1, 0)], max_new_tokens=1)

    def test_dropout_is_refused(self):
        model, rows = setup("llava")
        with pytest.raises(ValueError, match="training mode"):
            Continuations(model.train(), rows, REPLIES)

    def test_features_and_placeholders_must_agree(self):
        model, rows = setup("llava")
        rows["pixel_values"] = rows["pixel_values"][:2]
        with pytest.raises(ValueError, match="8 features, and its text has 12 image tokens"):
            Continuations(model, rows, REPLIES)

    def test_image_tokens_belong_into_prompts_and_not_to_their_end(self):
        model, rows = setup("llava")
        image = model.config.image_token_id
        with pytest.raises(ValueError, match="row 1 of the batch: its reply holds an image token"):
            Continuations(model, rows, [[9], [9, image]])
        rows["input_ids"][0, -1] = image
        with pytest.raises(ValueError, match="row 0 of the batch: its prompt ends with an image token"):
            Continuations(model, rows, REPLIES)

    def test_models_whose_cache_cannot_be_cut_say_why(self):
        model, rows = setup("llava")
        model.config.get_text_config().layer_types = ["linear_attention", "full_attention"]
        with pytest.raises(ValueError, match="layers of type linear_attention keep no keys"):
            Continuations(model, rows, REPLIES)
        model.config.get_text_config().layer_types = None
        assert why_not_continuable(model) is None
        model.forward = lambda input_ids: None
        assert "mm_encoder_outputs" in why_not_continuable(model)

    def test_adapters_that_add_tokens_are_refused(self):
        model, rows = setup("llava")
        config = PrefixTuningConfig(
            task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2, num_layers=2, token_dim=32, num_attention_heads=2
        )
        peft = get_peft_model(model, config).eval()
        with pytest.raises(ValueError, match="A PREFIX_TUNING adapter puts virtual tokens before the prompt"):
            Continuations(peft, rows, REPLIES)
