import pytest

from trl_vlm import pairs
from trl_vlm.data.rows import ROW_NAME
from trl_vlm.pairs import CombinedRejected, DatasetPairs, MixedPairs


def reply(text):
    return [{"role": "assistant", "content": text}]


def make_rows(count):
    prompt = [{"role": "user", "content": "?"}]
    return [
        {"prompt": prompt, "chosen": reply("good"), "rejected": reply("bad"), "number": number}
        for number in range(count)
    ]


class Online:
    """Rejects another reply, and leaves every seventh row undecided."""

    def __init__(self, chosen="good"):
        self.chosen, self.seen, self.dropped = chosen, [], {"no idea": 3}

    def __call__(self, rows, policy, round=0):
        self.seen += [row["number"] for row in rows]
        return [
            None
            if row["number"] % 7 == 6
            else {**row, "chosen": reply(self.chosen), "rejected": reply("made"), "pair_source": "online"}
            for row in rows
        ]


def refuse(rows, policy, round=0):
    raise AssertionError("this source must not be asked")


def test_offline_gives_the_rows_own_pairs():
    rows = [{**make_rows(1)[0], "completion": reply("other")}, {"completion": reply("good"), "rejected": reply("bad")}]
    pairs = DatasetPairs()(rows)
    assert [pair["chosen"] for pair in pairs] == [reply("good")] * 2
    assert {pair["pair_source"] for pair in pairs} == {"dataset"} and "pair_source" not in rows[0]
    with pytest.raises(ValueError, match="row 1, column 'rejected': it is missing"):
        DatasetPairs()([make_rows(1)[0], {"chosen": reply("good")}])


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_the_share_of_the_first_source_is_its_probability(share):
    rows, online = make_rows(10_000), Online()
    pairs = MixedPairs(DatasetPairs(), online, probability=share, seed=3)(rows, None)
    offline = [number for number, pair in enumerate(pairs) if pair is not None and pair["pair_source"] == "dataset"]
    assert abs(len(offline) / 10_000 - share) <= 3 * (share * (1 - share) / 10_000) ** 0.5
    assert sorted([*offline, *online.seen]) == list(range(10_000))
    assert all(pair is None or pair["number"] == number for number, pair in enumerate(pairs))
    assert all(pairs[number] is None for number in online.seen if number % 7 == 6)


@pytest.mark.parametrize(("share", "sources"), [(1.0, (DatasetPairs(), refuse)), (0.0, (refuse, DatasetPairs()))])
def test_share_one_and_zero_are_the_pure_sources(share, sources):
    rows = [{**row, ROW_NAME: f"row {place}"} for place, row in enumerate(make_rows(200))]
    assert MixedPairs(*sources, probability=share)(rows, None) == DatasetPairs()(rows)


def test_a_coin_hangs_on_the_row_and_the_turn_and_not_on_the_batch():
    rows = [{**row, ROW_NAME: f"train row {row['number']}"} for row in make_rows(60)]
    mixed = MixedPairs(DatasetPairs(), Online(), seed=1)
    together = mixed(rows, None)
    assert together == [pair for start in range(0, 60, 7) for pair in mixed(rows[start : start + 7], None)]
    assert together != mixed(rows, None, round=1) and together != MixedPairs(DatasetPairs(), Online(), seed=2)(
        rows, None
    )


def test_both_rejected_replies_stand_beside_one_chosen_reply():
    first, none = CombinedRejected(DatasetPairs(), Online())(make_rows(7)[5:], None)
    assert none is None
    assert (first["chosen"], first["rejected"], first["rejected_extra"]) == (
        reply("good"), reply("bad"), [reply("made")]
    )  # fmt: skip
    assert (first["pair_source"], first["pair_extra_source"]) == ("dataset", "online")
    three = CombinedRejected(CombinedRejected(Online(), DatasetPairs()), Online())(make_rows(1), None)[0]
    assert three["rejected_extra"] == [reply("bad"), reply("made")]


def test_sources_that_chose_differently_cannot_be_combined():
    with pytest.raises(ValueError, match="row 0: the two sources chose different replies, 'good' and 'better'"):
        CombinedRejected(DatasetPairs(), Online("better"))(make_rows(1), None)


def test_reasons_of_both_sources_are_counted():
    assert MixedPairs(Online(), Online()).dropped == CombinedRejected(Online(), Online()).dropped == {"no idea": 6}
    assert MixedPairs(DatasetPairs(), refuse).dropped == {}


def test_a_share_that_is_no_probability_is_refused():
    with pytest.raises(ValueError, match="`probability` is 1.5"):
        MixedPairs(DatasetPairs(), DatasetPairs(), probability=1.5)


@pytest.mark.parametrize("old", ["Offline", "Mixed", "BothRejected"])
def test_earlier_names_are_still_importable_and_say_what_they_are_called_now(old):
    with pytest.warns(DeprecationWarning, match=f"`trl_vlm.pairs.{old}` is now called"):
        found = getattr(pairs, old)
    assert found in (DatasetPairs, MixedPairs, CombinedRejected)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        getattr(pairs, "Nothing")  # noqa: B009
