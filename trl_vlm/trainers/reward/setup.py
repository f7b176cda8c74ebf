"""The setup of `RewardTrainer`: with or without images, model, judge template."""

from collections.abc import Callable, Sequence

from accelerate import DistributedType
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from trl_vlm.data.encoding import RewardCollator
from trl_vlm.data.facts import JUDGE_TEMPLATE_FILE, JudgeTemplate
from trl_vlm.data.rows import IMAGE_COLUMNS, Row
from trl_vlm.models._transformers import hub_arguments, reads_images
from trl_vlm.models.loading import base_of
from trl_vlm.models.prefix_sharing.sharing import share_pairs, why_pairs_not_shareable
from trl_vlm.models.reward_model import load_reward_model
from trl_vlm.trainers import preparation
from trl_vlm.trainers.card import FACT_RLHF_PAPER, NEEDS_PACKAGE, REWARD, CardFacts
from trl_vlm.trainers.preparation import config_of, loading_arguments, model_options, source_of
from trl_vlm.trainers.reward.config import RewardConfig
from trl_vlm.trainers.types import Model, Processor, Rows

TEXT_LOADING = """\
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained("{name}")"""


def wants_images(
    model: str | Model, args: RewardConfig, dataset: Rows | None, processing_class: Processor | None
) -> bool:
    """Whether to train with images: the model reads them, and the rows may have some."""
    if isinstance(processing_class, ProcessorMixin):
        return True
    columns = dataset.column_names if isinstance(dataset, Rows) else None
    has_images = columns is None or any(column in columns for column in IMAGE_COLUMNS)
    if not has_images or not reads_images(type(config_of(model, **loading_arguments(model, args)))):
        return False
    if processing_class is not None:
        raise TypeError(
            f"`processing_class` is a {type(processing_class).__name__}, and the rows have images. Pass the model's "
            "processor (`trl_vlm.models.processors.load_processor`), or nothing: it is then loaded with the model."
        )
    return True


def refuse_image_options(args: RewardConfig, judge_template: JudgeTemplate | None) -> None:
    """Raises if an option that only concerns images is set for a run without."""
    given = {
        "judge_template": judge_template or args.judge_template,
        "freeze_vision_tower": args.freeze_vision_tower,
        "projector_learning_rate": args.projector_learning_rate is not None,
        "drop_too_long_rows": args.drop_too_long_rows,
    }
    names = [name for name, value in given.items() if value]
    if names:
        raise ValueError(
            f"{names} are for models and rows with images, but the model reads none, or the rows have no column "
            "`images`. Unset them, add the column ([] for rows without), or pass a processor as `processing_class`."
        )


def load_tokenizer(model: str | Model, args: RewardConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a text model, from where the model's weights come; of an adapter, that of its base."""
    source, arguments = source_of(model), loading_arguments(model, args)
    base = base_of(source, **hub_arguments(arguments)) if isinstance(model, str) else None
    if base is not None:
        return AutoTokenizer.from_pretrained(base, trust_remote_code=arguments["trust_remote_code"])
    return AutoTokenizer.from_pretrained(source, **arguments)


def load_for_training(path: str, args: RewardConfig, quantization_config: BitsAndBytesConfig | None) -> Model:
    """The reward model of a checkpoint, loaded with TRL's defaults: float32, spread over devices only if alone."""
    settings = model_options(args)
    settings.pop("use_cache", None)  # a reward model reads each row once and needs no cache
    if quantization_config is not None:
        if "quantization_config" in settings:
            raise ValueError(
                "`quantization_config` came both as an argument of the trainer and in `args.model_init_kwargs`. "
                "Pass it as an argument only."
            )
        settings["quantization_config"] = quantization_config
    state = args.distributed_state
    assert state is not None and state.device is not None  # the arguments have chosen it
    if state.distributed_type != DistributedType.NO or state.device.type in ("cpu", "mps"):
        settings["device_map"] = None
    settings.setdefault("device_map", "auto")
    settings.setdefault("dtype", "float32")
    if args.trust_remote_code:
        settings.setdefault("trust_remote_code", True)
    return load_reward_model(path, head_seed=args.seed, **settings)


def resolve_judge_template(model: str | Model, args: RewardConfig, given: JudgeTemplate | None) -> JudgeTemplate:
    """The template that was passed, named, or saved with the model; else the default."""
    if given is not None and args.judge_template is not None:
        raise ValueError("`judge_template` came both as an argument of the trainer and in `args`. Pass one of them.")
    if given is None and args.judge_template is not None:
        named_none = args.judge_template.lower() == "none"
        given = JudgeTemplate.none() if named_none else JudgeTemplate.from_pretrained(args.judge_template)
    if given is None:
        try:
            given = JudgeTemplate.from_pretrained(source_of(model)) if isinstance(model, str) else JudgeTemplate()
        except FileNotFoundError:
            given = JudgeTemplate()
    return given if args.use_facts else given.without_facts()


def make_collator(processor: ProcessorMixin, template: JudgeTemplate, args: RewardConfig) -> RewardCollator:
    """The collator that the options describe."""
    limit, multiple = args.max_length, args.pad_to_multiple_of
    assert not isinstance(multiple, str)  # the arguments have parsed it
    return RewardCollator(
        processor,
        template,
        seed=args.seed,
        max_length=limit if isinstance(limit, int) else None,  # "auto" is no limit either
        pad_to_multiple_of=multiple,
        max_pixels=args.max_image_pixels,
        count_image_tokens=args.check_image_tokens,
    )


class SharingCollator:
    """A collator of pairs whose batches hold the images of a pair once, for a model that shares prefixes."""

    def __init__(self, collate: Callable[[Sequence[Row]], dict[str, Tensor]], config: PreTrainedConfig):
        self.collate, self.config = collate, config

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The batch of `rows`, with the key `SHARED_PREFIX`."""
        batch = self.collate(rows)
        margin = batch.pop("margin")
        return {"margin": margin, **share_pairs(batch, self.config)}


def float_head(model: Model, is_new: bool) -> None:
    """Undoes what TRL does to a trainable head beside 4-bit weights: bfloat16 has no room for steps of 1e-5.

    Args:
        model: The reward model with its adapter.
        is_new: Whether the adapter was made in this run. Then PEFT still holds the head from before TRL rounded it.
    """
    for name, head in model.named_modules():
        if name.rpartition(".")[2] != "score":
            continue
        trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
        original = getattr(head, "original_module", None)
        exact = original.parameters() if is_new and original is not None else trained
        for parameter, value in zip(trained, exact, strict=True):
            parameter.data = value.data.float().clone()


def why_no_shared_prefix(model: Model, args: RewardConfig, own_collator: bool) -> str | None:
    """Why prompts are computed once per reply, as one sentence; None if the pairs of a batch can share them."""
    reason = preparation.why_no_shared_prefix(model, args, own_collator, {})
    return reason or why_pairs_not_shareable(model.config)


def set_chat_template(processor: ProcessorMixin, args: RewardConfig) -> None:
    """Sets the processor's template to that of `args.chat_template_path`, if given; raises if it then has none."""
    path = args.chat_template_path
    if path is not None:
        if not path.endswith((".jinja", ".j2")):
            raise ValueError(
                f"`chat_template_path` is {path!r}. For a model with images it must be a Jinja file (.jinja, .j2): "
                "the template of another tokenizer knows nothing of images."
            )
        with open(path, encoding="utf-8") as file:
            processor.chat_template = file.read()
    if processor.chat_template is None:
        raise ValueError(
            "The processor has no chat template, so conversations cannot be laid out. Set `processor.chat_template`, "
            "or pass a Jinja file as `chat_template_path`."
        )


def card_facts(args: RewardConfig, template: JudgeTemplate | None) -> CardFacts:
    """The facts for the model card: the loss, the text around a reply, and that this package loads the model."""
    method = ["A reward model: the chosen reply of a pair is to score higher than the rejected one (Bradley-Terry)."]
    if args.mean_reward_coefficient is not None:
        method.append(f"Rewards were centered with weight {args.mean_reward_coefficient}.")
    if template is None:
        return CardFacts(method, loading=TEXT_LOADING)
    shown = "read after" if template.use_facts else "not shown in"
    sections = {}
    if template.request:
        method.append(f"Facts about the image were {shown} the reply, in the judge turn.")
        sections["Judge template"] = (
            f"Saved as `{JUDGE_TEMPLATE_FILE}`; a reply is scored at the end of this turn, with the facts in place of "
            f"`{{facts}}`:\n\n```text\n{template.request}\n\n{template.opening}\n```"
        )
    return CardFacts(
        method,
        loading=REWARD,
        needs_package=NEEDS_PACKAGE,
        papers=[FACT_RLHF_PAPER] if template.request else [],
        sections=sections,
    )
