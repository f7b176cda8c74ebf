"""CHAIR (arXiv:1809.02156): which objects captions of photographs invent, found by a table of words."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from trl_vlm.evaluation.benchmark import Benchmark, Question, Record, Scores
from trl_vlm.evaluation.benchmarks import captions
from trl_vlm.evaluation.files import need_image

REQUEST = "Please describe this image in detail."
TRAINING = "COCO_train2014_"


def read(data: Path) -> list[Question]:
    """One question per image of `coco_objects`, whose objects are annotated or named by its captions.

    Images of COCO's train2014 are left out: the rows of both parts are made at once, and Object HalBench needs them.
    """
    finder = captions.finder_in(data, "chair")
    questions = []
    for row in captions.images_with_objects(data, "chair"):
        image = row["images"][0]
        name = image["path"] if isinstance(image, dict) else image
        if name and PurePosixPath(name).name.startswith(TRAINING):
            continue
        if not isinstance(image, dict) or image.get("bytes") is None:
            image = str(name) if Path(name).is_file() else str(need_image(data, "chair", PurePosixPath(name).name))
        name, truth = str(row["image_id"]), {"objects": captions.shown_objects(row, finder)}
        questions.append(Question(name, REQUEST, truth, (image,), name, {"finder": finder}))
    return questions


def score(records: Sequence[Record]) -> Scores:
    """CHAIR over mentions, classes and words, by replies, recall and length.

    Differs: of a reply that was cut at the token limit the unfinished last sentence does not count.
    """
    found = [captions.finder_of(record).find(captions.whole_sentences(record)) for record in records]
    ratios = captions.object_ratios(found, [record.truth["objects"] for record in records])
    return Scores({**ratios, **captions.length_ratios(records)}, counts={"replies": float(len(records))})


CHAIR = Benchmark(
    name="chair",
    title="objects that captions invent, found by words",
    source="https://cocodataset.org (annotations of train and val2014), as rows with `images`, `objects`, `image_id`",
    license="CC-BY-4.0 annotations; images under Flickr's terms",
    size="as many images of val2014 as are given; papers take 500 or 5,000",
    files="chair/coco_objects.jsonl and val2014/; chair/synonyms.txt to use the published table",
    read=read,
    score=score,
    metrics=captions.METRICS,
    prompts={
        "detail": "{question}",
        "describe": "Describe this image in detail.",
        "brief": "Provide a one-sentence caption for the image.",
    },
)
