import pytest

from trl_vlm.evaluation.objects.finder import Mention, ObjectFinder
from trl_vlm.evaluation.objects.names import SYNONYMS

SENTENCES = {
    "Two dogs wait at a traffic light near a dining table.": ["dog", "traffic light", "dining table"],
    "A dog sits here.": ["dog"],
    "A man rides.": ["person"],
    "a man and a woman and a dog": ["person", "person", "dog"],
    "The seat of the toilet": ["toilet"],
    "hot dogs on a dining table": ["hot dog", "dining table"],
    "a baby elephant": ["elephant"],
    "He wears a bow tie.": ["tie"],
    "an orange shirt": ["orange"],
    "Two people and two dogs stand at a dining table. A man holds a dog.": [
        "person", "dog", "dining table", "person", "dog",
    ],
    "The toilet seat is up.": ["toilet"],
    "A chair with a red seat": ["chair", "chair"],
    "Baby giraffes and an adult zebra": ["giraffe", "zebra"],
    "A baby in a crib": ["person", "bed"],
    "The runner slides into home plate.": ["person"],
    "Weeds between the train tracks": [],
    "A train on the train tracks": ["train"],
    "A passenger jet over a passenger train": ["airplane", "train"],
    "A passenger waits.": ["person"],
    "Teddy bears and stuffed animals": ["teddy bear", "teddy bear"],
    "A bear beside a stuffed bear": ["bear", "teddy bear"],
    "Three wine glasses and a glass of water": ["wine glass"],
    "Knives, forks and teaspoons": ["knife", "fork", "spoon"],
    "Buses and boxes": ["bus"],
    "Sandwiches on benches": ["sandwich", "bench"],
    "Ponies, calves, geese, and sheep": ["horse", "cow", "bird", "sheep"],
    "Mice beside keyboards": ["mouse", "keyboard"],
    "She skis on her skis.": ["skis", "skis"],
    "A pair of scissors": ["scissors"],
    "Children and policemen": ["person", "person"],
    "The man's cell-phone and the women's hair dryers": ["person", "cell phone", "person", "hair drier"],
    "a TV, a television set and a monitor": ["tv", "tv", "tv"],
    "Doughnuts and cupcakes": ["donut", "cake"],
    "A fire truck beside a fire hydrant": ["truck", "fire hydrant"],
    "A skateboarder jumps with his skateboard.": ["person", "skateboard"],
    "Surfers carry surf boards.": ["person", "surfboard"],
    "A tennis racquet, a tennis ball and a baseball bat": ["tennis racket", "sports ball", "baseball bat"],
    "A catcher with a baseball glove": ["person", "baseball glove"],
    "potted plants in a vase": ["potted plant", "vase"],
    "A polar bear": ["bear"],
    "Puppies, kittens and ducklings": ["dog", "cat", "bird"],
    "A STOP SIGN and a parking meter": ["stop sign", "parking meter"],
    "An umbrella, a purse, a rucksack and luggage": ["umbrella", "handbag", "backpack", "suitcase"],
    "A dirt bike and a mountain bike": ["motorcycle", "bicycle"],
    "A computer mouse": ["mouse"],
    "The microwave oven is in the oven's place.": ["microwave", "oven"],
    "Broccoli, carrots, pizzas": ["broccoli", "carrot", "pizza"],
    "The sky is blue over glassy water.": [],
    "This is a scar on the carpet; scarves and dogmatic cats' eyes": ["cat"],
    "": [],
}  # fmt: skip


@pytest.mark.parametrize(("text", "names"), SENTENCES.items(), ids=range(len(SENTENCES)))
def test_the_objects_of_a_sentence_are_found(text, names):
    assert len(SENTENCES) >= 40
    assert ObjectFinder().names(text) == names


def test_every_class_of_coco_is_found_by_its_name_and_plural():
    finder = ObjectFinder()
    assert len(SYNONYMS) == 80
    for name, others in SYNONYMS.items():
        assert finder.names(f"There is a {name} there.") == [name]
        for word in others:
            assert finder.names(f"a {word} there") == [name], word
        if not name.endswith("s"):
            assert finder.names(f"many {name}s") == [name]


def test_no_word_belongs_to_two_classes():
    words = [word for name, others in SYNONYMS.items() for word in (name, *others)]
    assert sorted(words) == sorted(set(words))


def test_a_mention_tells_its_words_and_its_class():
    assert ObjectFinder().find("Men and a woman") == [Mention("man", "person"), Mention("woman", "person")]


def test_a_table_in_chairs_format_replaces_ours(tmp_path):
    file = tmp_path / "synonyms.txt"
    file.write_text("person, man , walker\ntoilet\nchair, seat\ngiant squid, kraken\n\n")
    finder = ObjectFinder.from_file(file)
    assert finder.names("Walkers and a woman see krakens and dogs.") == ["person", "giant squid"]
    assert finder.names("the toilet seat") == ["toilet"]
    with pytest.raises(ValueError, match="there is no file of synonyms"):
        ObjectFinder.from_file(tmp_path / "other.txt")
    file.write_text("\n")
    with pytest.raises(ValueError, match="holds no class"):
        ObjectFinder.from_file(file)


def test_names_of_a_ground_truth_become_classes():
    finder = ObjectFinder().with_names(["Dog", "lighthouse"])
    assert finder.classes_of(["Dog", "men", "Lighthouse", "whatever"]) == {"dog", "person", "lighthouse", "whatever"}
    assert finder.names("Lighthouses and dogs") == ["lighthouse", "dog"]
