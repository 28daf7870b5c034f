"""How servers are talked to and kept, with a small HTTP server in vLLM's place."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tbrm.config.recipe import config_to_dict
from tbrm.config.schema import ConfigError, VllmConfig
from tbrm.parallel import World
from tbrm.policy.tiny import tiny_tokenizer
from tbrm.rollout import Request, Response, Sampling
from tbrm.rollout.vllm.colocated import ColocatedEngine
from tbrm.rollout.vllm.connection import HungError, LateError, RefusedError, ServerError, headers_from_environment
from tbrm.rollout.vllm.engine import VllmEngine
from tbrm.rollout.vllm.keeper import Keeper, publish
from tbrm.rollout.vllm.same_model import SameModel
from tbrm.rollout.vllm.server import Server
from tbrm.training.trainer import Trainer
from tests.tbrm.conftest import tiny_config
from tests.tbrm.rollout.vllm.vllm_runs import vllm_config

NOT_FOUND = 404, '{"detail":"Not Found"}'
HTML = 200, "<html>please log in</html>"
CHOICE = {
    "token_ids": [7, 8],
    "finish_reason": "stop",
    "logprobs": {"content": [{"logprob": -1.0}, {"logprob": -2.0}]},
    "weight_versions": [{"version": "run-1"}],
}
Answer = tuple[int, str]


class Drip(str):
    """A body that comes a byte at a time."""


class Fake(ThreadingHTTPServer):
    """Answers each path with what `answers` has for it, or that gives; 404 where there is none."""

    daemon_threads = True

    def __init__(self, **answers: Any) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = {f"/{path}": answer for path, answer in answers.items()}
        self.asked: list[tuple[str, dict[str, str]]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def server(self, timeout: float = 5, **options: Any) -> Server:
        return Server(f"http://127.0.0.1:{self.server_port}", timeout, **options)


class _Handler(BaseHTTPRequestHandler):
    server: Fake

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.asked.append((self.path, dict(self.headers)))
        answer = self.server.answers.get(self.path.partition("?")[0], NOT_FOUND)
        status, text = answer(json.loads(body or "{}")) if callable(answer) else answer
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        with suppress(ConnectionError):  # who asked waits no longer
            for piece in text if isinstance(text, Drip) else [text]:
                self.wfile.write(piece.encode())
                time.sleep(0.1 * isinstance(text, Drip))

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


def vllm_that_keeps(tag: dict[str, str]) -> dict[str, Any]:
    """What a keeper asks, with the tag of the weights in `tag`."""

    def update(body: dict[str, str]) -> Answer:
        tag["tag"] = body["new_version"]
        return 200, ""

    return {
        "version": (200, '{"version": "0.32.0"}'),
        "v1/models": (200, '{"data": [{"max_model_len": 512}]}'),
        "weight_info": lambda _: (200, json.dumps({"weight_version": tag["tag"]})),
        "update_weight_version": update,
        "reset_prefix_cache": (200, '{"success": true}'),
        "pause": (200, ""),
        "resume": (200, ""),
    }


@pytest.fixture
def keepers() -> Iterator[Callable[..., Keeper]]:
    made = []

    def make(*arguments: Any, **options: Any) -> Keeper:
        made.append(Keeper(*arguments, **options))
        return made[-1]

    yield make
    for keeper in made:
        keeper.close()


# What ends a run is said.


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


# A server that is slow is not dead.


def busy(progress: Callable[[], object], seconds: float, **answers: Any) -> Fake:
    """Owes an answer for so long, and counts tokens as `progress` says."""

    def generate(_: Any) -> Answer:
        time.sleep(seconds)
        return 200, json.dumps({"choices": [CHOICE]})

    def metrics(_: Any) -> Answer:
        return (
            200,
            f'# HELP x\nvllm:prompt_tokens_total{{engine="0"}} 7.0\nvllm:generation_tokens_total{{e="0"}} {progress()}\n',
        )

    return Fake(**{"health": (200, ""), "metrics": metrics, "inference/v1/generate": generate, **answers})


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


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    folder = tmp_path_factory.mktemp("trainer")
    return Trainer(tiny_config(folder, evaluation={"prompts": 0}))


def engine_with(trainer: Trainer, fake: Fake, tmp_path: Path, **vllm: Any) -> VllmEngine:
    """That has sent its weights to the server."""
    settings = {"addresses": [fake.server().address], "start_timeout": 1, "request_timeout": 1, **vllm}
    config = tiny_config(tmp_path, rollout__engine="vllm", rollout__vllm=settings).rollout
    engine = VllmEngine(config, trainer.policy, trainer.chat, tmp_path)
    engine._servers = [fake.server(timeout=config.vllm.request_timeout)]
    engine._max_model_len, engine._version = 512, 0
    return engine


def test_what_ends_a_run_is_named_whatever_failed_last(trainer: Trainer, tmp_path: Path) -> None:
    fake = busy(lambda: 5, seconds=8, metrics=NOT_FOUND)
    engine = engine_with(trainer, fake, tmp_path, start_timeout=2)
    threading.Timer(1.5, fake.answers.update, [{"/inference/v1/generate": (500, "out of luck")}]).start()
    with pytest.raises(
        ServerError, match=r"start_timeout \(2 s\).* is late: .*request_timeout \(1 s\).*500: out of luck"
    ):
        engine.generate([Request([1, 2])], Sampling(4))


def test_a_request_that_fails_is_heard_before_one_that_is_still_under_way(trainer: Trainer, tmp_path: Path) -> None:
    def generate(body: dict[str, Any]) -> Answer:
        if body["token_ids"] == [1]:
            time.sleep(30)
        return 400, "no such thing"

    engine = engine_with(
        trainer, Fake(**{"inference/v1/generate": generate, "health": (200, "")}), tmp_path, request_timeout=60
    )
    begun = time.monotonic()
    with pytest.raises(RefusedError, match="400: no such thing"):
        engine.generate([Request([1]), Request([2])], Sampling(4))
    assert time.monotonic() - begun < 20


# Addresses, keys and headers.


def test_a_key_and_headers_come_from_the_environment_and_stay_there(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sekret")
    monkeypatch.setenv("MY_TEAM", "red\n")
    fake = Fake(version=(200, '{"version": "0.32.0"}'))
    engine = engine_with(trainer, fake, tmp_path, api_key_env="MY_KEY", headers_env={"X-Team": "MY_TEAM"})
    server = fake.server(headers=engine._headers)
    server.ask("/version", "version")
    [(_, headers)] = fake.asked
    assert (headers["Authorization"], headers["X-Team"]) == ("Bearer sekret", "red")
    assert "sekret" not in repr(server) + json.dumps(
        config_to_dict(
            tiny_config(
                tmp_path, rollout__vllm={"api_key_env": "MY_KEY", "addresses": ["http://a:1"]}, rollout__engine="vllm"
            )
        )
    )
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(ConfigError, match=r"rollout.vllm.api_key_env: the environment has no MY_KEY"):
        headers_from_environment(VllmConfig(addresses=["http://a:1"], api_key_env="MY_KEY"))
    monkeypatch.setenv("MY_KEY", "two\nlines")
    with pytest.raises(ConfigError, match="no MY_KEY, or one that no header can hold") as caught:
        headers_from_environment(VllmConfig(addresses=["http://a:1"], api_key_env="MY_KEY"))
    assert "lines" not in str(caught.value)


def test_a_key_that_is_missing_is_asked_for() -> None:
    with pytest.raises(RefusedError, match=r"answered 401.*rollout.vllm.api_key_env names the variable"):
        Fake(version=(401, '{"error":"Unauthorized"}')).server().max_model_len()


def test_a_path_before_vllms_own_is_kept() -> None:
    fake = Fake(**{"team/version": (200, '{"version": "0.32.0"}')})
    [address] = VllmConfig(addresses=[f"{fake.server().address}/team/v1/"]).addresses
    assert Server(address, 5).ask("/version", "version") == "0.32.0"


# The model that a server has.


def test_log_probs_of_another_temperature_are_refused(trainer: Trainer) -> None:
    info = {"vllm_config": {"model_config": {"logprobs_mode": "raw_logprobs"}}}
    fake = Fake(collective_rpc=(200, '{"results": ["?"]}'), server_info=(200, json.dumps(info)))
    same = SameModel(trainer.policy)
    same(fake.server())  # at temperature 1 they are the same
    same.temperature = 0.7
    with pytest.raises(RefusedError, match=r"gives raw_logprobs, .* \(0.7\): start it with --logprobs-mode processed"):
        same(fake.server())


def test_a_mixture_of_experts_is_refused_where_vllm_computes_it_wrongly(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    tokenizer = tiny_tokenizer()
    lm = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            moe_intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            num_experts=2,
            num_experts_per_tok=1,
        )
    )
    lm.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for engine in ("vllm", "vllm_colocated"):
        with pytest.raises(ConfigError, match=r"vLLM 0.32 on a CPU computes with wrong experts"):
            Trainer(vllm_config(tmp_path / "run", tmp_path / "model", engine))


def test_more_barred_ids_than_vllm_takes_are_refused(trainer: Trainer, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, rollout__engine="vllm", rollout__vllm={"addresses": ["http://a:1"]}).rollout
    most, more = (replace(trainer.chat, barred=range(number)) for number in (1024, 1025))
    VllmEngine(config, trainer.policy, most, tmp_path)
    for make in (
        lambda: VllmEngine(config, trainer.policy, more, tmp_path),
        lambda: ColocatedEngine(config, trainer.policy, more),
    ):
        with pytest.raises(ConfigError, match=r"rollout.bar_unused_ids: .* for 1025 ids, and vLLM bars 1024 at most"):
            make()


def test_processes_wait_longer_for_each_other_than_for_a_server(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, rollout__engine="vllm", parallel={"timeout": 20})
    with pytest.raises(
        ConfigError, match=r"parallel.timeout: 20 s, .* raise it above 900 s, rollout.vllm.start_timeout and"
    ):
        Trainer(config, world=World(rank=0, size=2))
