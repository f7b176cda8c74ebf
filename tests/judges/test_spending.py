import logging

import pytest

from tests.judges.helpers import endpoint, said, with_usage
from trl_vlm.judges import EndpointChat, EndpointJudge, Request, ScriptedJudge, Spending, spending_of
from trl_vlm.judges import endpoint as module
from trl_vlm.pairs import DatasetPairs, Judged, MixedPairs

ASKED = [Request("How many cups are there?", (), "row 0")]


def counted(*_):
    return with_usage(said("Two."), prompt=2000, completion=500)


def test_a_chat_says_what_it_has_spent_by_the_prices_of_a_million_tokens(tmp_path):
    with endpoint(counted) as server:
        chat = EndpointChat(server.url, "judge", cache=tmp_path, prompt_price=2.5, completion_price=10.0)
        assert not chat.spending
        chat(ASKED)
        chat(ASKED)
    assert chat.spending == Spending(1, 1, 2000, 500, pytest.approx(0.01))
    assert str(chat.spending) == "1 requests, 1 answers from the cache, 2,000 + 500 tokens, cost 0.01"


def test_without_prices_there_are_tokens_and_without_usage_requests(tmp_path):
    for behave, text in ((counted, "1 requests, 2,000 + 500 tokens"), (lambda *_: said("Two."), "1 requests")):
        with endpoint(behave) as server:
            chat = EndpointChat(server.url, "judge")
            chat(ASKED)
        assert str(chat.spending) == text


def test_it_is_logged_from_time_to_time_while_it_runs(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    with endpoint(counted) as server:
        chat = EndpointChat(server.url, "judge", prompt_price=1.0)
        chat(ASKED)
        assert "tokens" not in caplog.text
        monkeypatch.setattr(module, "SHOWN_EVERY_SECONDS", 0.0)
        chat(ASKED)
    assert f"judge at {server.url}: 2 requests, 4,000 + 1,000 tokens, cost 0.00." in caplog.text


def test_judges_and_sources_have_spent_what_their_endpoints_have():
    with endpoint(counted) as server:
        judge = EndpointJudge(server.url, "judge")
        judge.chat(ASKED)
    mixture = MixedPairs(DatasetPairs(), Judged(judge))
    assert spending_of(mixture) == spending_of(judge) == Spending(1, 0, 2000, 500)
    assert not spending_of(Judged(ScriptedJudge(lambda comparison: 0)))
    assert not spending_of(None)


def test_spendings_add_up():
    assert Spending(1, 2, 3, 4) + Spending(1, 1, 1, 1, 2.0) == Spending(2, 3, 4, 5, 2.0)
    assert (Spending(cost=1.0) + Spending(cost=2.0)).cost == 3.0


@pytest.mark.parametrize("name", ["prompt_price", "completion_price"])
@pytest.mark.parametrize("price", [-1.0, float("nan")])
def test_a_price_is_a_number(name, price):
    with pytest.raises(ValueError, match=f"`{name}` is {price}"):
        EndpointChat("http://localhost/v1", "judge", **{name: price})
