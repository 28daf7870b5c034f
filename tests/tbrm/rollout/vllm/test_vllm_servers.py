"""How servers are talked to and kept, with a small HTTP server in vLLM's place."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tbrm.rollout import Response
from tbrm.rollout.vllm.connection import HungError, LateError, RefusedError, ServerError
from tbrm.rollout.vllm.keeper import Keeper, publish
from tbrm.rollout.vllm.server import Server
from tests.tbrm.rollout.vllm.fake_server import CHOICE, HTML, NOT_FOUND, Drip, Fake, busy, vllm_that_keeps


@pytest.fixture
def keepers() -> Iterator[Callable[..., Keeper]]:
    made = []

    def make(*arguments: Any, **options: Any) -> Keeper:
        made.append(Keeper(*arguments, **options))
        return made[-1]

    yield make
    for keeper in made:
        keeper.close()


def test_what_answers_at_an_address_and_is_no_vllm_is_shown(keepers: Callable[..., Keeper]) -> None:
    keeper = keepers(Fake(weight_info=HTML).server(), lambda _: None)
    for attempt in (1, 2):
        with pytest.raises(ServerError, match="/weight_info answered what no vLLM does: <html>please log in</html>"):
            publish([keeper], f"run-{attempt}", wait_for_all=True, seconds=0.5)


def test_an_exception_that_nobody_foresaw_is_shown_and_waited_for_no_longer(keepers: Callable[..., Keeper]) -> None:
    def send(_: Server) -> None:
        raise KeyError("out of the blue")

    keeper = keepers(Fake(**vllm_that_keeps({"tag": "default"})).server(), send)
    for attempt in (1, 2):
        with pytest.raises(ServerError, match=r"vLLM has no weights: KeyError: 'out of the blue'"):
            publish([keeper], f"run-{attempt}", wait_for_all=True, seconds=60)


def test_a_server_that_was_of_use_is_given_time_even_if_something_else_answers_for_it(
    keepers: Callable[..., Keeper],
) -> None:
    fake = Fake(**vllm_that_keeps({"tag": "default"}))
    keeper = keepers(fake.server(), lambda _: None)
    publish([keeper], "run-1", wait_for_all=True, seconds=5)
    mended = fake.answers.pop("/weight_info")
    threading.Timer(1.5, fake.answers.update, [{"/weight_info": mended}]).start()
    publish([keeper], "run-2", wait_for_all=True, seconds=30)


def test_another_run_on_the_same_server_is_named(
    keepers: Callable[..., Keeper], capsys: pytest.CaptureFixture[str]
) -> None:
    tag = {"tag": "default"}
    keeper = keepers(Fake(**vllm_that_keeps(tag)).server(), lambda _: None)
    publish([keeper], "ours-1", wait_for_all=True, seconds=5)
    publish([keeper], "ours-2", wait_for_all=True, seconds=5)
    assert not capsys.readouterr().err
    for version in (7, 8):
        tag["tag"] = f"theirs-{version}"
        deadline = time.monotonic() + 20
        while tag["tag"] != "ours-2":
            assert time.monotonic() < deadline
            time.sleep(0.05)
    said = capsys.readouterr().err
    assert said.count("was given weights 'theirs-7', which are not ours: another run uses it, too") == 1
    assert "theirs-8" not in said


@pytest.mark.parametrize(
    ("ask", "wanted"),
    [
        (lambda server: server.weights(timeout=5), "VLLM_SERVER_DEV_MODE=1 in its environment"),
        (lambda server: server.generate([1], {}), "--enable-scale-out"),
        (lambda server: server.call("POST", "/v1/load_lora_adapter", {}), "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
    ],
)
def test_a_server_started_without_what_we_need_is_told_what(ask: Callable[[Server], object], wanted: str) -> None:
    with pytest.raises(RefusedError, match=f"answered 404.*start it with .*{wanted}"):
        ask(Fake().server())


def test_too_many_requests_are_of_the_moment() -> None:
    with pytest.raises(ServerError, match="answered 429: not now"):
        Fake(version=(429, "not now")).server().max_model_len()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([], r"gave 0 responses for 2: \[\]"),
        ([CHOICE], r"gave 1 responses for 2: \[\{'token_ids': \[7, 8\]"),
        (None, r"gave no response \(TypeError: 'NoneType' object is not iterable\): None"),
        (
            [{**CHOICE, "weight_versions": []}] * 2,
            r"without the versions of the weights .* its weight_versions is \[\]",
        ),
        ([{**CHOICE, "token_ids": [7]}] * 2, "a response came with 1 token_ids and 2 logprobs"),
        (
            [{**CHOICE, "logprobs": {"content": [{"logprob": None}]}}] * 2,
            r"gave no response \(TypeError: float.. argument",
        ),
    ],
)
def test_answers_that_are_not_what_was_asked_for_are_shown(choices: object, message: str) -> None:
    fake = Fake(**{"inference/v1/generate": (200, json.dumps({"choices": choices}))})
    with pytest.raises(ServerError, match=message):
        fake.server().generate([1], {"n": 2})


def test_a_server_that_does_not_say_how_long_its_model_is_is_shown() -> None:
    models = 200, '{"data": [{"max_model_len": null}]}'
    with pytest.raises(ServerError, match="/v1/models answered max_model_len None; wants a number of tokens"):
        Fake(**{"version": (200, '{"version": "0.32.0"}'), "v1/models": models}).server().max_model_len()


def test_an_answer_is_not_late_while_the_server_makes_tokens_for_others() -> None:
    begun = time.monotonic()
    assert busy(lambda: time.monotonic() - begun, seconds=2.5).server(timeout=0.8).generate([1], {}) == [
        (Response([7, 8], truncated=False, logprobs=[-1.0, -2.0]), {"run-1"})
    ]


def test_a_server_that_makes_no_token_hangs() -> None:
    with pytest.raises(
        HungError, match=r"is late: no answer for rollout.vllm.request_timeout \(0.8 s\), and it has made no token"
    ):
        busy(lambda: 5, seconds=8).server(timeout=0.8).generate([1], {})


def test_a_server_that_does_not_count_tokens_is_late_and_does_not_hang() -> None:
    with pytest.raises(
        LateError, match=r"is late: .*request_timeout \(0.8 s\), and its /metrics do not tell"
    ) as caught:
        busy(lambda: 5, seconds=8, metrics=NOT_FOUND).server(timeout=0.8).generate([1], {})
    assert not isinstance(caught.value, HungError)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda server: server.weights(timeout=0.8), "/weight_info: no answer within 0.8 s"),
        (lambda server: server.generate([1], {}), r"is late: .*request_timeout \(0.8 s\), and it has made no token"),
    ],
)
def test_a_server_whose_answer_drips_is_late(ask: Callable[[Server], object], message: str) -> None:
    drip = 200, Drip(" " * 60)
    server = busy(lambda: 5, seconds=0, **{"weight_info": drip, "inference/v1/generate": drip}).server(timeout=0.8)
    begun = time.monotonic()
    with pytest.raises(LateError, match=message):
        ask(server)
    assert time.monotonic() - begun < 4


def test_a_server_that_is_not_well_is_left_at_once_by_all_who_wait() -> None:
    server = busy(lambda: 5, seconds=30, health=(503, "the engine is dead")).server(timeout=8)
    begun, failures = time.monotonic(), []

    def wait() -> None:
        with pytest.raises(ServerError, match="answered 503: the engine is dead"):
            server.generate([1], {})
        failures.append(time.monotonic() - begun)

    threads = [threading.Thread(target=wait) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(failures) == len(threads)
    assert max(failures) < 20
