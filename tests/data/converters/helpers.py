"""Records with the true column names of each public dataset, and invented content."""

import io
import json
from pathlib import Path

from PIL import Image


def png(colour: str = "red", size: tuple[int, int] = (12, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


def image_folder(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (12, 8), "blue").save(folder / name)
    return folder


def rlhf_v(image=None, question="What is in the park?", chosen="Two dogs run.", rejected="Three dogs run.", **other):
    return {
        "ds_name": "RLHF-V",
        "image": {"bytes": png(), "path": None} if image is None else image,
        "text": json.dumps({"question": question, "chosen": chosen, "rejected": rejected}),
        "origin_dataset": "coco",
        "origin_split": '{"model": "Muffin", "type": "detailed description"}',
        "idx": 17,
        "image_path": "coco/park.jpg",
        **other,
    }


def rlaif_v(**other):
    return {
        "ds_name": "RLAIF-V",
        "image": {"bytes": png("green"), "path": "7.png"},
        "question": "What is on the table?",
        "chosen": "A red cup.",
        "rejected": "A red cup and a fork.",
        "origin_dataset": "coco",
        "origin_split": '{"type": "question answering"}',
        "idx": "7",
        "image_path": "coco/7.jpg",
        **other,
    }


def annotated(**other):
    return {
        "name": "row 3",
        "view": "pairs",
        "label": "rejected",
        "image": "bus.png",
        "prompt": [{"role": "user", "content": "Describe it."}],
        "reply": "Three dogs run 🐕 there.",
        "rewrite": "Two dogs run there.",
        "spans": [{"start": 0, "end": 5, "text": "Three", "kind": "number"}],
        **other,
    }


def annotation(helpfulness, ethics, faithfulness):
    names = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")
    ratings = (helpfulness, ethics, faithfulness)
    return {name: {"Rating": rating, "Rationale": "because"} for name, rating in zip(names, ratings, strict=True)}


def vlfeedback(ratings, responses=None, **other):
    models = [f"model-{number}" for number in range(len(ratings))]
    return {
        "id": "svit-1",
        "prompt": "What colour is the bus?",
        "models": models,
        "img_path": "/somewhere/else/svit/bus.png",
        "completions": {
            "annotations": [annotation(*rating) for rating in ratings],
            "model": models,
            "response": responses or [f"Answer {number}." for number in range(len(ratings))],
        },
        **other,
    }


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def povid(conversations=None, rejected=None, **other):
    return {
        "id": "COCO_train2014_000000000009",
        "image": "./data/coco/COCO_train2014_000000000009.jpg",
        "conversations": conversations or [human("<image>\nDescribe it."), gpt("A bowl.")],
        "rejected_conversations": rejected or [human("<image>\nDescribe it."), gpt("A bowl and a fork.")],
        **other,
    }


def llava_preference(conversations=None, **other):
    return {
        "id": "000000111111",
        "image": "000000111111.jpg",
        "hallucination": True,
        "preference": 2,
        "conversations": conversations or [human("<image>\nWhat is on the bench?"), gpt("")],
        "output_1": gpt("A cat in a hat."),
        "output_2": gpt("A grey cat."),
        **other,
    }


def fact_rlhf(**other):
    return {
        "id": "000000222222",
        "image": "000000222222.jpg",
        "conversations": [
            human("What runs on rails?\nA. bus\nB. tram\n<image>"),
            gpt("..."),
            human("Why?"),
            gpt("..."),
        ],
        "captions": ["A bus.", " A red bus on a street.\n"],
        "caption_type": 3,
        "length_bonus": -0.5,
        **other,
    }


FACTS = {
    "000000111111.jpg": ["A grey cat sleeps on a bench.", "A cat outside.\n"],
    "000000222222.jpg": ["A bus beside a tram."],
    "aok_000000222222.jpg": ["Trams run on rails."],
}


def nlf(**other):
    return {
        "pic": 42,
        "ask": "What is in the sink?",
        "first": "Two cups and a knife.",
        "feedback": "There is no knife.",
        "points": 2,
        "after": "Two cups.",
        **other,
    }


NLF_COLUMNS = {
    "image_column": "pic",
    "question_column": "ask",
    "refined_column": "after",
    "initial_column": "first",
}


def vl_rewardbench(**other):
    return {
        "id": "RLAIF-V-14",
        "query": "<image>\nWhat is on the table?",
        "response": ["A red cup.", "Two dogs."],
        "image": {"bytes": png("green"), "path": "14.png"},
        "human_ranking": [0, 1],
        "models": ["OmniLMM-12B", "OmniLMM-12B"],
        "judge": "human",
        "rationale": None,
        "query_source": "COCO",
        "meta": "{}",
        "human_error_analysis": ["hallucination"],
        "ground_truth": None,
        **other,
    }


def multimodal_rewardbench(**other):
    return {
        "ID": "mathvista-12",
        "Text": "How many bars are there?",
        "Image": "images/bus.png",
        "Output1": "Four.",
        "Output2": "Five.",
        "Better": "Output2",
        "Category": "reasoning",
        **other,
    }


def llava_conversations(conversations=None, **other):
    return {
        "id": "000000333333",
        "image": "000000333333.jpg",
        "conversations": conversations
        or [human("<image>\nWhat stands there?"), gpt("A red bus."), human("Is anyone in it?"), gpt("No.")],
        **other,
    }


def mmpr(**other):
    return {
        "image": "coco/train2017/bus.png",
        "question": "<image>\nHow many people are there?",
        "chosen": "Two people.",
        "rejected": "Two people and a dog.",
        **other,
    }


def hsa_dpo(**other):
    return {
        "id": 7,
        "question": "<image>\nDescribe the table.",
        "chosen": "A red cup.",
        "rejected": "A red cup and two forks.",
        "chosen_score": 1.0,
        "rejected_score": 2.5,
        **other,
    }


def mdpo(**other):
    return {
        "img_path": "images/bus.png",
        "prompt": "A chat between a user and an assistant. USER: <image>\nWhat color is the bus? ASSISTANT:",
        "chosen": "Red.",
        "rejected": "It is a blue bus.",
        **other,
    }


def a_okvqa(**other):
    return {
        "image_id": 42,
        "question_id": "2x7",
        "question": "What runs on rails?",
        "choices": ["bus", "tram", "boat", "car"],
        "correct_choice_idx": 1,
        "direct_answers": ["tram", "train"],
        "difficult_direct_answer": False,
        "rationales": ["Trams run on rails", "The rails are for a tram.", "A tram."],
        **other,
    }


def write_vqav2(folder: Path) -> Path:
    """Two images of one split: two questions and one; the files as visualqa.org publishes them."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = [(42, 42000, "Is the cat asleep?"), (42, 42001, "What is it on?"), (9, 9000, "How many cups?")]
    questions = [
        {"question_id": name, "image_id": image, "question": question} for image, name, question in reversed(asked)
    ]
    answers = {42000: ("yes/no", "yes"), 42001: ("other", "bed"), 9000: ("number", "2")}
    annotations = [
        {
            "question_id": name,
            "image_id": image,
            "question_type": "is the",
            "answer_type": answers[name][0],
            "multiple_choice_answer": answers[name][1],
            "answers": [{"answer": answers[name][1], "answer_confidence": "yes", "answer_id": 1}] * 10,
        }
        for image, name, _ in asked
    ]
    about = {"info": {}, "license": {}, "data_subtype": "train2014", "data_type": "mscoco"}
    (folder / "v2_OpenEnded_mscoco_train2014_questions.json").write_text(
        json.dumps({**about, "task_type": "Open-Ended", "questions": questions})
    )
    (folder / "v2_mscoco_train2014_annotations.json").write_text(json.dumps({**about, "annotations": annotations}))
    return folder


FLICKR_CAPTIONS = """[/EN#1/people A man] rides [/EN#2/vehicles a bike] past [/EN#3/scene the lake] .
Outside , [/EN#1/people a cyclist] .
"""
FLICKR_BOXES = """<annotation><size><width>500</width><height>400</height><depth>3</depth></size>
<object><name>1</name><bndbox><xmin>50</xmin><ymin>40</ymin><xmax>150</xmax><ymax>300</ymax></bndbox></object>
<object><name>2</name><name>4</name><bndbox><xmin>0</xmin><ymin>200</ymin><xmax>500</xmax><ymax>400</ymax></bndbox>
</object><object><name>2</name><bndbox><xmin>10</xmin><ymin>20</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object>
<object><name>3</name><scene>1</scene><nobndbox>1</nobndbox></object></annotation>
"""


def write_flickr(folder: Path) -> Path:
    """One image with two captions and the boxes of their phrases, as the published archive holds them."""
    (folder / "Sentences").mkdir(parents=True)
    (folder / "Annotations").mkdir()
    (folder / "Sentences" / "7.txt").write_text(FLICKR_CAPTIONS)
    (folder / "Annotations" / "7.xml").write_text(FLICKR_BOXES)
    return folder


def write_hadpo(folder: Path) -> Path:
    """Two descriptions and two questions, one of which the model answered rightly."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptions = {
        "1": {"chosen": ["A cup.", "It is a cup."], "rejected": ["A cup and a fork.", "A cup, a fork."]},
        "2": {"chosen": ["A dog."], "rejected": ["A dog and a cat."]},
    }
    question = {"image_id": 1, "question": "Is there a fork?", "answer": "no", "correct": False}
    questions = [
        {**question, "chosen": "No, there is none.", "reject": "Yes, a fork."},
        {**question, "chosen": "No.", "reject": "None.", "correct": True},
    ]
    (folder / "desc_data.json").write_text(json.dumps(descriptions))
    (folder / "pope_data.json").write_text(json.dumps(questions))
    return folder


def write_coco_captions(folder: Path) -> Path:
    """Two images, of which one has captions, in COCO's file."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [{"id": 42, "file_name": "000000000042.jpg"}, {"id": 9, "file_name": "000000000009.jpg"}]
    captions = [{"image_id": 42, "id": n, "caption": text} for n, text in enumerate(["A puppy. ", "A red dog."])]
    (folder / "captions_train2017.json").write_text(
        json.dumps({"info": {}, "images": images, "annotations": captions})
    )
    return folder
