"""The picture of the README shows replies as they were given, and what is invented in them in its own color."""

import json
from xml.etree import ElementTree

from PIL import Image

from benchmarks.before_after import INVENTED, TRUE, averages, best_example, picture

REPLIES = {
    "supervised model": [
        "there is a ball . there is a bird .",
        "i see a car . there is a sign . there is a cup .",
        "a",
    ],
    "PPO, with facts": ["there is a ball .", "i see a car . i see a tree .", "there is a bird ."],
}
OBJECTS = [["ball"], ["car", "tree"], ["bird"]]


def world(folder):
    (folder / "scenes" / "images").mkdir(parents=True)
    results = []
    for model, replies in REPLIES.items():
        place = folder / "evaluation" / model.replace(", ", "_").replace(" ", "_") / "testbed-captions-plain"
        place.mkdir(parents=True)
        names = ["iid-0", "adv-0", "adv-1"]
        records = [
            {"id": name, "reply": reply, "truth": {"objects": objects}}
            for name, reply, objects in zip(names, replies, OBJECTS, strict=True)
        ]
        (place / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
        value = 0.21 if model.startswith("sup") else 0.039
        results.append({"model": model, "task": "testbed-captions", "metrics": {"adv_chair_i": value}})
        for name in names:
            Image.new("RGB", (48, 48)).save(folder / "scenes" / "images" / f"{name}.png")
    (folder / "evaluation" / "results.json").write_text(json.dumps({"results": results}))
    return folder


def test_the_picture_with_most_inventions_that_are_all_cured_is_shown(tmp_path):
    folder = world(tmp_path)
    example = best_example(folder)
    assert example.objects == ["car", "tree"] and example.rank == (True, 2, 2)  # not iid-0, which is as in training
    svg = picture(example, averages(folder))
    root = ElementTree.fromstring(svg)
    colored = [(span.text, span.get("fill")) for span in root.iter("{http://www.w3.org/2000/svg}tspan")]
    wrong = [("sign", INVENTED), ("cup", INVENTED)]
    assert colored == [("car", TRUE), *wrong, ("car", TRUE), ("tree", TRUE)]
    assert "21 were not there before Fact-RLHF, and 3.9 after." in svg and "data:image/png;base64," in svg
