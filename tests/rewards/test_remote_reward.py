"""A reward model behind an address: the same scores as in the process, or an error that says what is wrong."""

import base64
import http.client
import io
import json
import logging
import multiprocessing
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from tests import families
from tests.distributed import launch
from tests.rewards.helpers import TEMPLATE, Lengths, Running, free_port, running, save_reward_model
from trl_vlm.data.errors import RowError
from trl_vlm.data.io.http import JSONServer
from trl_vlm.rewards import FactRLHFReward, RemoteReward, RewardModelReward, checked
from trl_vlm.rewards.server import Limits, make_app
from trl_vlm.rewards.wire import DATA_URI, image_uri

ABOUT = {"model": "a folder", "revision": None, "template": {}}
KEY = "a-key-that-nobody-shows"


def user(content) -> list[dict]:
    return [{"role": "user", "content": content}]


def assistant(content: str) -> list[dict]:
    return [{"role": "assistant", "content": content}]


def asked(reward, rows, **more) -> list[float]:
    columns = {name: [row[name] for row in rows] for name in ("images", "facts")}
    return reward([row["prompt"] for row in rows], [row["completion"] for row in rows], **columns, **more)


def row(reply: str, images=(), question="What is in the image?", facts=None) -> dict:
    return {"prompt": user(question), "completion": assistant(reply), "images": list(images), "facts": facts}


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def in_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward-model")
    save_reward_model(folder)
    return RewardModelReward(folder, batch_size=4)


@pytest.fixture(scope="module")
def server(in_process):
    with running(make_app(in_process, ABOUT)) as server:
        yield server


@pytest.fixture(scope="module")
def stand_in():
    """A server without a model."""
    with running(make_app(Lengths(), ABOUT)) as server:
        yield server


def remote(server, **options) -> RemoteReward:
    return RemoteReward(server.address, **{"first_wait_seconds": 0.02, "timeout_seconds": 20, **options})


def rows_of_all_kinds(folder) -> list[dict]:
    """Images in every form, none, two; facts and none; text in parts and as strings; control tokens; empty replies."""
    file = folder / "image.png"
    file.write_bytes(encoded(families.image(1)))
    turned = families.image(5).getexif()
    turned[0x0112] = 6  # to be turned by a quarter
    deep = Image.fromarray((np.arange(1200).reshape(30, 40) * 50).astype(np.uint16))
    inside = user([{"type": "image", "image": families.image(6)}, {"type": "text", "text": "What is it?"}])
    later = user("What is in the image?") + assistant("A cat.") + user("Sure?")
    return [
        row("A cat.", [families.image(0)], facts=["a cat", "a dog"]),
        row("A green tree.", [file, families.image(2)], facts=[]),
        row("A dog", question="Describe."),
        row("A cat.", [str(file)], facts=["a cat"]),
        row("A cat.", [encoded(families.image(3), "JPEG")]),
        row("A cat.", [{"bytes": encoded(families.image(4)), "path": None}]),
        row("A cat.", [encoded(families.image(5), "JPEG", exif=turned)]),
        row("A cat.", [Image.open(io.BytesIO(encoded(families.image(5), "JPEG", exif=turned)))]),
        row("A cat.", [deep]),
        row("A cat.", [np.asarray(families.image(7))]),
        row("A cat.", [families.image(8).convert("RGBA")]),
        row("A cat.</s> judge . <image> it is", [families.image(0)], facts=["a tree"]),
        row("", [families.image(0)]),
        {**row("A cat."), "prompt": inside},
        {**row("Yes.", [families.image(0)]), "prompt": later},
        {**row(""), "completion": []},
    ]


def test_scores_are_those_of_the_model_in_the_process_to_the_last_digit(in_process, server, tmp_path):
    rows = rows_of_all_kinds(tmp_path)
    expected = asked(in_process, rows)
    assert asked(remote(server, batch_size=4), rows) == expected
    # Batches of another size are padded in another way.
    assert asked(remote(server, batch_size=3), rows) == pytest.approx(expected, abs=1e-5)
    assert asked(remote(server, request_bytes=1), rows) == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) > 10


def test_it_takes_the_place_of_a_reward_model_in_rewards_that_are_made_of_one(stand_in):
    reward = checked(FactRLHFReward(remote(stand_in), eos_token_ids=2, length_coefficient=0.0))
    prompts, completions = [user("What?")] * 2, [assistant("A cat."), assistant("A cat and a dog.")]
    assert reward(prompts=prompts, completions=completions, completion_ids=[[5, 2], [5, 6]]) == [6.0, 16.0 - 8.0]


def test_the_single_image_column_and_an_empty_rollout_work(stand_in):
    reward = remote(stand_in)
    assert reward([user("What?")], [assistant("It.")], image=[families.image(0)]) == [3 + 1 / 8]
    assert reward([], []) == []


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"images": [b"\x89PNG\r\n\x1a\n not really"]}, "is not an image that Pillow can read"),
        ({"images": ["/etc/passwd"]}, "is not an image that Pillow can read"),
        ({"images": [encoded(families.image(0))[:-400]]}, "the file is damaged or cut short"),
        (
            {"images": [families.image(0)], "prompt": user([{"type": "text", "text": "What?"}])},
            "image placeholders .0.",
        ),
        ({"facts": "a cat"}, "Pass a list of strings, one per fact"),
        ({"prompt": "What?"}, "the prompt is a plain string"),
        (
            {"prompt": user([{"type": "video", "video": "v.mp4"}])},
            r"train row 42: prompt\.0\.content: Input tag \'video\'",
        ),
        ({"prompt": user([{"type": "text", "text": b"What?"}])}, "holds something that cannot be sent"),
    ],
)
def test_a_bad_row_is_named_whichever_side_finds_it(server, broken, reason):
    rows = [row("A cat."), row("A dog."), {**row("A tree."), **broken}, row("A cup.")]
    with pytest.raises(RowError, match=reason) as refused:
        asked(remote(server, batch_size=2), rows, row_name=[f"train row {place}" for place in (40, 41, 42, 43)])
    assert "train row 42" in str(refused.value)
    assert not [name for name in ("row 40", "row 41", "row 43") if name in str(refused.value)]


def test_a_row_that_is_too_long_is_named(in_process):
    short = RewardModelReward(in_process.model, in_process.processor, TEMPLATE, max_length=60)
    with running(make_app(short, ABOUT)) as server, pytest.raises(RowError, match="row 1.*60"):
        asked(remote(server), [row("A cat."), row("A cat. " * 60)])


def post(server, content, key=None, **headers) -> tuple[int, object]:
    """What the server answers to a body of one's own."""
    client = JSONServer(f"{server.address}/score", key, timeout_seconds=20)
    response = client.post(content if isinstance(content, bytes) else json.dumps(content).encode())
    return response.status, json.loads(response.body).get("detail")


GOOD = {"prompt": user("What?"), "completion": assistant("It.")}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**GOOD, "images": ["/etc/hostname"]}, "image 0: it is no data URI"),
        ({**GOOD, "images": ["http://127.0.0.1:9/x.png"]}, "image 0: it is no data URI"),
        ({**GOOD, "images": [DATA_URI + "!!!"]}, "its base64 cannot be decoded"),
        ({**GOOD, "images": [DATA_URI]}, "zero bytes"),
        ({**GOOD, "images": [1]}, "image 0: it is image 1 of the request, which has 1"),
        ({**GOOD, "images": [-1]}, "image 0: it is image -1 of the request"),
        ({**GOOD, "images": [0]}, "is not an image that Pillow can read"),
        ({**GOOD, "images": 3}, "images: Input should be a valid"),
        ({**GOOD, "prompt": user([{"type": "image", "image": "/etc/hostname"}])}, "Extra inputs are not permitted"),
        ({**GOOD, "prompt": user([{"type": "image", "path": "/etc/hostname"}])}, "Extra inputs are not permitted"),
        (
            {**GOOD, "prompt": user([{"type": "image_url", "image_url": {"url": "x"}}])},
            "'image_url' found using 'type' does not match",
        ),
        ({"prompt": user("What?")}, "completion: Field required"),
        ({**GOOD, "fact": ["a cat"]}, "fact: Extra inputs are not permitted"),
        ({**GOOD, "facts": "a cat"}, "facts: Input should be a valid"),
    ],
)
def test_a_row_may_name_no_path_and_no_address_and_must_have_the_form(stand_in, row, reason):
    status, detail = post(stand_in, {"rows": [GOOD, row], "images": [DATA_URI + "AAAA"]})
    assert (status, detail["row"]) == (422, 1)
    assert reason in detail["message"]


@pytest.mark.parametrize(
    ("content", "status"),
    [(b"{", 400), (b"[" * 100_000, 400), ({"rows": []}, 400), ({"row": [GOOD]}, 400), (b"\xff\xfe", 400)],
)
def test_what_is_no_request_is_refused(stand_in, content, status):
    assert post(stand_in, content)[0] == status


def bomb(width: int, height: int) -> bytes:
    """A small file whose header announces a large picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def test_requests_have_limits_which_are_seen_before_anything_is_decoded():
    limits = Limits(body_bytes=400_000, rows=3, pixels=10_000_000, images=2, characters=100)
    reward = Lengths()
    with running(make_app(reward, ABOUT, limits=limits)) as server:
        picture = image_uri(families.image(0), "an image")
        huge, large = (
            (DATA_URI + base64.b64encode(bomb(*size)).decode()) for size in ((12_000, 10_000), (3000, 2000))
        )
        assert post(server, {"rows": [GOOD] * 3})[0] == 200
        assert post(server, {"rows": [GOOD] * 4}) == (413, "the request has 4 rows; the server takes 3 at once")
        assert post(server, {"rows": [GOOD], "x": "y" * 500_000})[0] == 413
        assert post(server, b" " * 30_000_000)[0] == 413  # more than lies in buffers between the two
        for row, reason in (
            ({**GOOD, "images": [picture] * 3}, "it has 3 images; the server takes 2"),
            ({**GOOD, "completion": assistant("x" * 101)}, "its texts have 106 characters; the server takes 100"),
            ({**GOOD, "facts": ["x" * 101]}, "its texts have 109 characters"),
            ({**GOOD, "images": [huge]}, "120,000,000 pixels, more than the limit"),
        ):
            status, detail = post(server, {"rows": [row]})
            assert (status, detail["row"]) == (422, 0) and reason in detail["message"]
        status, detail = post(server, {"rows": [{**GOOD, "images": [large, large]}]})
        assert status == 413 and "may have 10,000,000 pixels" in detail
        assert reward.calls == [["It."] * 3]
        with pytest.raises(ConnectionError, match=r"refuses row 0 and 3 more \(HTTP 413: the request has 4 rows"):
            remote(server)([user("What?")] * 4, [assistant("It.")] * 4)


def test_a_body_without_an_announced_length_has_the_same_limit(stand_in):
    with running(make_app(Lengths(), ABOUT, limits=Limits(body_bytes=1000))) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/score", iter([b" " * 600] * 5), headers, encode_chunked=True)
        assert connection.getresponse().status == 413
        connection.close()


def test_a_page_of_a_browser_cannot_post_here_without_being_asked_for_permission(stand_in):
    connection = http.client.HTTPConnection("127.0.0.1", stand_in.port, timeout=20)
    connection.request("POST", "/score", json.dumps({"rows": [GOOD]}), {"Content-Type": "text/plain"})
    assert connection.getresponse().status == 415
    connection.close()


def test_a_server_with_a_key_answers_nobody_else_and_no_text_shows_the_key(monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("REWARD_KEY", KEY)
    monkeypatch.setenv("OTHER_KEY", "another-key")
    with running(make_app(Lengths(), ABOUT, key=KEY)) as server:
        reward = remote(server, key_variable="REWARD_KEY")
        assert reward([user("What?")], [assistant("It.")]) == [3.0]
        assert reward.health()["model"] == "a folder"
        errors = []
        for options in ({}, {"key_variable": "OTHER_KEY"}):
            for ask in (lambda other: other.health(), lambda other: other([user("?")], [assistant("It.")] * 1)):
                with pytest.raises(ConnectionError, match="refuses the key .*Set `key_variable`") as refused:
                    ask(remote(server, **options))
                errors.append(str(refused.value))
        assert post(server, b" " * 30_000_000, key="wrong")[0] == 401
    shown = "".join([*errors, repr(reward), str(vars(reward)), caplog.text, *capfd.readouterr()])
    assert KEY not in shown and "another-key" not in shown


def test_health_says_model_revision_template_and_limits(in_process, server):
    about = remote(server).health()
    assert {name: about[name] for name in ABOUT} == ABOUT
    assert about["status"] == "ok" and about["batch_size"] == 4 and about["limits"]["rows"] == 256


def test_another_server_and_none_are_told_from_a_reward_server(server):
    with pytest.raises(ConnectionError, match="No reward server answers at http://127.0.0.1:9 .*serve-reward"):
        RemoteReward("http://127.0.0.1:9").health()
    elsewhere = RemoteReward(f"{server.address}/v1")
    with pytest.raises(ConnectionError, match="refuses the request .HTTP 404"):
        elsewhere.health()
    with pytest.raises(ConnectionError, match="refuses row 0 .HTTP 404"):
        elsewhere([user("What?")], [assistant("It.")])


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"address": "gpu-7:8100"}, "`address` is 'gpu-7:8100'"),
        ({"address": "http://me:secret@host"}, "holds a user name, a password"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"patience_seconds": float("inf")}, "`patience_seconds` is inf"),
        ({"key_variable": "NOT_SET"}, "environment variable 'NOT_SET' is empty or not set"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, fault):
    with pytest.raises(ValueError, match=fault):
        RemoteReward(**{"address": "http://localhost:8100", **options})


def test_a_server_that_stays_away_ends_the_run_when_patience_does():
    reward = RemoteReward("http://127.0.0.1:9", first_wait_seconds=0.02, patience_seconds=0.3)
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=r"gave no scores of row 0 and 1 more for 0.3 s .*Connection"):
        reward([user("What?")] * 2, [assistant("It.")] * 2)
    assert time.monotonic() - start < 3


def test_a_busy_server_is_asked_again_when_it_says(caplog):
    with running(make_app(Lengths(seconds=0.2), ABOUT, limits=Limits(waiting=1))) as server:
        reward = remote(server, batch_size=1, concurrency=4)
        assert reward([user("What?")] * 4, [assistant("x" * size) for size in range(4)]) == [0.0, 1.0, 2.0, 3.0]
    assert "HTTP 503" in caplog.text and "requests are waiting" in caplog.text


def test_a_full_gpu_is_said_at_once():
    class Full(Lengths):
        def __call__(self, *_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    said = "HTTP 507: out of memory; start the server with a smaller --batch-size"
    with running(make_app(Full(), ABOUT)) as server, pytest.raises(ConnectionError, match=said):
        remote(server)([user("What?")], [assistant("It.")])


def test_an_image_that_many_rows_share_is_sent_once(stand_in, monkeypatch):
    read, sent = [], []
    monkeypatch.setattr(
        "trl_vlm.rewards.remote.image_uri", lambda value, name: read.append(name) or image_uri(value, name)
    )
    send = JSONServer.post
    monkeypatch.setattr(JSONServer, "post", lambda self, body: sent.append(len(body)) or send(self, body))
    shared, other = families.image(0), families.image(1)
    equal = families.image(0)  # as a dataset decodes it for each reply
    rows = [row("A cat.", [shared]), row("A dog.", [other, shared]), row("A tree.", [shared]), row("A cup.", [equal])]
    assert asked(remote(stand_in), rows) == [6 + 1 / 8, 6 + 2 / 8, 7 + 1 / 8, 6 + 1 / 8]
    assert read == ["row 0, image 0", "row 1, image 0", "row 3, image 0"]
    (size,) = sent
    assert 0 < size - 2 * len(image_uri(shared, "it")) < 1000


@pytest.mark.nightly
@pytest.mark.distributed
def test_each_process_of_a_training_asks_for_its_own_rows(in_process, tmp_path):
    """GRPO of TRL on two processes: as many rows are asked for as there are replies, and each gets its score."""
    rows = []

    class Counted(Lengths):
        def __call__(self, *arguments, **columns):
            rows.extend(columns["row_name"])
            return in_process(*arguments, **columns)

    with running(make_app(Counted(), ABOUT)) as server:
        folders = {"reward_folder": None, "policy_folder": str(families.saved("llava"))}
        report = launch(
            "tests/rewards/distributed_main.py",
            "ddp",
            processes=2,
            folder=tmp_path / "run",
            address=server.address,
            **folders,
        )
    expected = asked(in_process, [row("A cat.", [families.image(0)], facts=["a cat"])])[0]
    assert report["steps"] == 1 and report["scores"] == pytest.approx([expected] * 2, abs=1e-6)
    assert len(rows) == 2 * 2 + 2  # two replies on each process, and one question of each at the end


class SlowAndCounted:
    """A reward model whose every 25th answer comes later than its client waits."""

    def __init__(self, reward):
        self.reward, self.batch_size, self.scored = reward, reward.batch_size, 0

    def __call__(self, *arguments, **columns):
        self.scored += 1
        time.sleep(0.6 if self.scored % 25 == 0 else 0.002)
        return self.reward(*arguments, **columns)


BAD_REQUEST = 61  # of the second process


def ask_a_hundred_times(process: int, address: str, results) -> None:
    """One process of a training: a request for each row, and one row that is broken."""
    reward = RemoteReward(address, timeout_seconds=0.4, first_wait_seconds=0.05, patience_seconds=60)
    for place in range(100):
        asked_for = request_row(process, place)
        is_bad = process == 1 and place == BAD_REQUEST
        if is_bad:
            asked_for["images"] = [encoded(families.image(0))[:-400]]
        try:
            (score,) = asked(reward, [asked_for], row_name=[f"train row {place}"])
            results.put((process, place, score))
        except RowError as error:
            results.put((process, place, str(error)))


def request_row(process: int, place: int) -> dict:
    words = ["cat", "dog", "tree", "square", "circle", "wall"]
    return row(f"A {words[place % 6]}.", [families.image(place % 5 + 5 * process)], facts=[words[place % 3]])


@pytest.mark.slow
def test_two_processes_a_slow_server_a_restart_and_a_bad_row_lose_nothing(in_process):
    expected = {
        (process, place): asked(in_process, [request_row(process, place)])[0]
        for process in (0, 1)
        for place in range(100)
    }
    port, fork = free_port(), multiprocessing.get_context("fork")
    results = fork.Queue()
    address = f"http://127.0.0.1:{port}"
    # They are there before the server is.
    workers = [fork.Process(target=ask_a_hundred_times, args=(process, address, results)) for process in (0, 1)]
    for worker in workers:
        worker.start()
    reward = SlowAndCounted(in_process)
    first = Running(make_app(reward, ABOUT), port)
    while reward.scored < 70:
        time.sleep(0.01)
    first.stop(at_once=True)
    time.sleep(0.3)
    with running(make_app(reward, ABOUT), port):
        found = dict(
            ((process, place), said) for process, place, said in (results.get(timeout=60) for _ in range(200))
        )
    for worker in workers:
        worker.join(20)
        assert worker.exitcode == 0
    message = found.pop((1, BAD_REQUEST))
    assert message.startswith(f"train row {BAD_REQUEST}") and "the file is damaged or cut short" in message
    del expected[1, BAD_REQUEST]
    assert found == expected  # to the last digit
    assert reward.scored > 200  # some were asked again
    assert results.empty()
