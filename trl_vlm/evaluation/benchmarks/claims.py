"""Wrong claims in replies to images of your own: a judge that sees is asked about each sentence."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from trl_vlm.data.messages import message_text
from trl_vlm.data.rows import ROW_NAME, check_row, row_images
from trl_vlm.evaluation.benchmark import Benchmark, Question, Ratio, Record, Scores
from trl_vlm.evaluation.benchmarks.captions import length_ratios, whole_sentences
from trl_vlm.evaluation.files import need_file, need_image, records_of
from trl_vlm.evaluation.metrics import Metric
from trl_vlm.evaluation.scoring import Judging, answers_in
from trl_vlm.judges.chat import Answer, Request
from trl_vlm.judges.claims import CLAIM_CHECK, check_request, claim_verdict
from trl_vlm.rewards.claims import CheckedReply, Claim, ClaimQuestion, sentence_claims

FOLDER = "claims"
REQUEST = "Describe the image in detail."


def read(data: Path) -> list[Question]:
    """A question per row of `claims.jsonl` or `claims.parquet`: its prompt, or a request for a description."""
    path = need_file(data, FOLDER, ["claims.jsonl", "claims.parquet"])
    questions = []
    for number, row in enumerate(records_of(path, ("images",))):
        name = f"{path}, row {number}"
        prompt = row.get("prompt") or [{"role": "user", "content": REQUEST}]
        check_row({**row, "prompt": prompt}, "ppo", name=name, with_images=True)
        images = tuple(_image(data, image) for image in row_images(row, name))
        if not images:
            raise ValueError(f"{name} has no image, so that no claim could be checked. Leave the row out.")
        text = "\n".join(filter(None, map(message_text, prompt)))
        group = next((image for image in images if isinstance(image, str)), str(number))
        questions.append(Question(str(number), text, {}, images, group, messages=prompt if row.get("prompt") else ()))
    return questions


def _image(data: Path, image: object) -> object:
    """The image, if it comes with its bytes, or its file below the data folder."""
    if isinstance(image, Mapping):
        if image.get("bytes") is not None:
            return image
        image = image.get("path")
    path = str(image)
    return path if Path(path).is_absolute() else str(need_image(data, FOLDER, path))


def reply_request(question: Question, record: Record) -> Request | None:
    """The reply whose claims are checked; None if it claims nothing."""
    text = whole_sentences(record)
    return Request(text, question.images, f"claims, row {question.id}") if _claims(text) else None


def claim_requests(request: Request) -> list[Request]:
    """A question for each claim of a reply."""
    row = {"images": request.images, ROW_NAME: request.name}
    found = [check_request(ClaimQuestion(row, claim.text)) for claim in _claims(request.text)]
    return [each for each in found if each is not None]  # each has an image


def score(records: Sequence[Record]) -> Scores:
    """How many claims are wrong, and of how many replies that is known. Undecided claims count as neither."""
    replies = [_checked(record) for record in records]
    wrong = [float(reply.wrong) for reply in replies]
    undecided = [float(reply.undecided) for reply in replies]
    claims = [float(len(reply.claims)) for reply in replies]
    one = [1.0] * len(records)
    is_known = [float(w > 0 or not u) for w, u in zip(wrong, undecided, strict=True)]
    ratios = {
        "wrong_per_reply": Ratio(wrong, one),
        "replies_with_wrong": Ratio([float(count > 0) for count in wrong], is_known),
        "wrong_share": Ratio(wrong, [c - u for c, u in zip(claims, undecided, strict=True)]),
        "undecided": Ratio(undecided, claims, 0.0),
        "claims_per_reply": Ratio(claims, one),
    }
    return Scores(ratios | length_ratios(records), counts={"replies": float(len(records))})


def _checked(record: Record) -> CheckedReply:
    claims = _claims(whole_sentences(record))
    answers = answers_in(record.answer, len(claims))
    return CheckedReply(claims, [claim_verdict(Answer(text, "no answer")) for text in answers])


def _claims(text: str) -> Sequence[Claim]:
    ((claims, _),) = sentence_claims([{}], [text])
    return claims


CLAIMS = Benchmark(
    name="claims",
    title="wrong claims in replies to images of your own, checked one by one by a judge that sees",
    source="given",
    license="yours",
    size="yours",
    files="claims.jsonl or claims.parquet: rows with images and, if you like, prompt",
    read=read,
    score=score,
    metrics=(
        Metric("wrong_per_reply", "wrong claims per reply", is_share=False, better="lower"),
        Metric("replies_with_wrong", "replies with a wrong claim", better="lower"),
        Metric("wrong_share", "wrong claims", better="lower"),
        Metric("undecided", "undecided claims", better="lower"),
        Metric("claims_per_reply", "claims per reply", is_share=False),
        Metric("length_words", "reply length (words)", is_share=False),
        Metric("empty", "empty replies", better="lower"),
        Metric("unfinished", "unfinished replies", better="lower"),
        Metric("replies", "replies", is_share=False),
    ),
    max_new_tokens=512,
    judging=Judging(CLAIM_CHECK, reply_request, sees_images=True, parts=claim_requests),
)
