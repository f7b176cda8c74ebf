"""MMHal-Bench (arXiv:2309.14525): a judge rates from 0 to 6 how informative and how true a reply is."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from trl_vlm.evaluation.benchmark import Benchmark, Question, Ratio, Record, Scores
from trl_vlm.evaluation.benchmarks.pope import only
from trl_vlm.evaluation.files import need_file, need_image, records_of
from trl_vlm.evaluation.metrics import Metric
from trl_vlm.evaluation.scoring import Judging, filled, published_rating, rating
from trl_vlm.judges.chat import Request

TYPES = ("attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other")
TRUE_FROM = 3  # ratings below it say that the reply hallucinates
HIGHEST_INFORMATIVE = 3

_TASK = """You judge, without favor, how a model answered a question about an image. Two things count: how \
informative the answer is, and whether it hallucinates.

A hallucination is something that the answer says and that neither the image nor the question shows or implies: \
a thing, number, color, place, action or relation that is wrong or invented. It is not a hallucination to say \
that something cannot be known, to add general knowledge that is right, or to draw a conclusion that what is \
there supports.

{sight} The reference answer was written by a person; it may leave out what is there, so more than the reference\
 is not yet wrong.

Five examples of what counts:
- Objects: chair, table, lamp. "How many chairs are there?" Reference: two. Answer: "There are three chairs." A \
wrong number: hallucination.
- Objects: dog, ball. "What is the dog doing?" Reference: it plays with a ball. Answer: "The dog plays with a \
ball, which keeps it fit." A harmless addition: no hallucination.
- Objects: boat, person. "Describe the scene." Reference: a man in a boat. Answer: "A man sits in a boat, a \
lighthouse behind him." An invented thing in the background: hallucination.
- Objects: person, sunglasses. "What color are her eyes?" Reference: they cannot be seen. Answer: "I cannot \
tell, since she wears sunglasses." Honest doubt: no hallucination.
- Objects: bridge. "What is this bridge?" Reference: the Golden Gate Bridge. Answer: "The Golden Gate Bridge, \
opened in 1937." Right knowledge beyond the image: no hallucination.

The ratings:
6: very informative, with good analysis or reasoning, no hallucination
5: very informative, no hallucination
4: somewhat informative, no hallucination
3: not informative, no hallucination
2: very informative, with hallucination
1: somewhat informative, with hallucination
0: not informative, with hallucination

Objects in the image: {contents}
Question: {question}
Reference answer: {reference}
Answer of the model: {reply}

Explain your judgment in a few sentences. Then write a last line that holds the rating and nothing else, such \
as "Rating: 4"."""
TEXT_ONLY = _TASK.replace("{sight}", "You do not see the image; you get a list of objects in it, which is incomplete.")
WITH_IMAGE = _TASK.replace("{sight}", "You see the image, and get an incomplete list of objects in it.")


def read(data: Path, folder: str = "mmhal") -> list[Question]:
    """The 96 questions of `response_template.json`, in its order, with the images beside it.

    Raises:
        ValueError: The question types are not in the published order.
    """
    path = need_file(data, folder, ["response_template.json", "*mmhal*.json", "*mmhal*.jsonl"])
    fields = ("question_type", "question_topic", "image_src", "image_content", "question", "gt_answer")
    questions = []
    for number, record in enumerate(records_of(path, fields)):
        if record["question_type"] != TYPES[number % len(TYPES)]:
            raise ValueError(
                f"{path}, record {number} has the type {record['question_type']!r}; as published it is "
                f"{TYPES[number % len(TYPES)]!r} there. Keep the published order: its numbers by type depend on it."
            )
        image = need_image(data, folder, PurePosixPath(record["image_src"]).name)
        contents = record["image_content"]
        if isinstance(contents, dict):  # the dataset's loading script has {"class": [...]}
            contents = contents["class"]
        truth = {
            "type": record["question_type"],
            "topic": record["question_topic"],
            "contents": ", ".join(contents),
            "reference": record["gt_answer"],
        }
        questions.append(Question(str(number), record["question"], truth, (str(image),), image.name))
    return questions


def rating_request(question: Question, record: Record, template: str, sees_images: bool) -> Request:
    """How many points does the reply get?"""
    values = {
        "contents": question.truth["contents"],
        "question": question.text,
        "reference": question.truth["reference"],
        "reply": record.reply,
    }
    images = question.images if sees_images else ()
    return Request(filled(template, values), images, f"mmhal, question {question.id}")


def score(records: Sequence[Record]) -> Scores:
    """Mean rating, hallucination rate and informativeness, over the answers that could be read; and as published.

    Differs: the published code counts an answer that it cannot read as 0, a hallucination: `published_score`.
    """
    rated = [rating(record.answer) for record in records]
    known = [float(points is not None) for points in rated]
    points = [float(value or 0) for value in rated]
    one = [1.0] * len(records)
    published = [float(published_rating(record.answer)) for record in records]
    ratios = {
        "score": Ratio(points, known),
        "hallucination_rate": Ratio([k * (p < TRUE_FROM) for p, k in zip(points, known, strict=True)], known),
        "informativeness": Ratio([_informative(p) * k for p, k in zip(points, known, strict=True)], known),
        "unparsed": Ratio([1 - k for k in known], one),
        "published_score": Ratio(published, one),
        "published_hallucination_rate": Ratio([float(p < TRUE_FROM) for p in published], one),
        "length_words": Ratio([float(len(record.reply.split())) for record in records], one),
    }
    for name in TYPES:
        ratios[f"score_{name}"] = only(ratios["score"], [record.truth["type"] == name for record in records])
    return Scores(ratios, counts={"replies": float(len(records))})


def _informative(points: float) -> float:
    """From 0 to 1, whether the reply is true or not."""
    return (points - TRUE_FROM if points >= TRUE_FROM else points) / HIGHEST_INFORMATIVE


METRICS = (
    Metric("score", "rating (0 to 6)", is_share=False, better="higher"),
    Metric("hallucination_rate", "replies that hallucinate", better="lower"),
    Metric("informativeness", "informativeness", better="higher"),
    Metric("unparsed", "unparsed answers of the judge", better="lower"),
    Metric("published_score", "rating, published reading", is_share=False, better="higher"),
    Metric("published_hallucination_rate", "replies that hallucinate, published reading", better="lower"),
    *(Metric(f"score_{name}", f"rating, {name}", is_share=False, better="higher") for name in TYPES),
    Metric("length_words", "reply length (words)", is_share=False),
    Metric("replies", "replies", is_share=False),
)
_SOURCE = "https://huggingface.co/datasets/Shengcao1006/MMHal-Bench"
_FILES = "mmhal/response_template.json and mmhal/images/ (test_data.zip)"

MMHAL = Benchmark(
    name="mmhal",
    title="informativeness and hallucination, rated by a judge that reads",
    source=_SOURCE,
    license="Apache-2.0; images of OpenImages",
    size="96 questions, 174 MB",
    files=_FILES,
    read=read,
    score=score,
    metrics=METRICS,
    max_new_tokens=1024,
    judging=Judging(TEXT_ONLY, partial(rating_request, template=TEXT_ONLY, sees_images=False)),
)
MMHAL_V = Benchmark(
    name="mmhal-v",
    title="informativeness and hallucination, rated by a judge that sees",
    source=_SOURCE,
    license="Apache-2.0; images of OpenImages",
    size="96 questions, 174 MB",
    files=_FILES,
    read=read,
    score=score,
    metrics=METRICS,
    max_new_tokens=1024,
    judging=Judging(WITH_IMAGE, partial(rating_request, template=WITH_IMAGE, sees_images=True), sees_images=True),
)
