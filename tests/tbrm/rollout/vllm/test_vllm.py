"""A real vLLM server on the CPU, driven by the trainer's own code. A start takes most of the time here, so tests share one."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tbrm.config.section import ConfigError
from tbrm.rollout import Request, Sampling, make_requests
from tbrm.rollout.vllm import handover
from tbrm.rollout.vllm.check import StaleWeightsError
from tbrm.rollout.vllm.connection import RefusedError, ServerError, _connect
from tbrm.rollout.vllm.engine import VllmEngine
from tbrm.rollout.vllm.same_model import SameModel
from tbrm.rollout.vllm.server import Server, check_version, cut, sampling_params
from tbrm.training.trainer import Trainer
from tests.tbrm.rollout.vllm.served import Left, change_weights, engine_of, kill_worker
from tests.tbrm.rollout.vllm.vllm_runs import PROMPTS, assert_answers_are_the_policys, save_model, vllm_config

pytest.importorskip("vllm", reason="vLLM is not installed")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """After one training step of a model with a tied head. Weights lie where no socket could, and there is a key for others."""
    folder = tmp_path_factory.mktemp("tied")
    far = folder / ("far" * 40)
    far.mkdir()
    config = vllm_config(folder / "run", save_model(folder / "model", tied=True), weights_dir=str(far))
    # A stop string that never comes: with one, servers have the tokenizer.
    rollout = config.rollout.model_copy(update={"stop_strings": ["@~@~@~@"]})
    trainer = Trainer(config.model_copy(update={"rollout": rollout}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", "of somebody else's server")
        metrics = trainer.train_step()
    assert metrics["sync/logprob_gap_max"] < 1e-4
    assert metrics["engine/restarts"] == metrics["engine/reissued"] == 0
    yield trainer
    left = Left.of(engine_of(trainer))
    trainer.engine.close()
    assert left.nothing()


@pytest.fixture
def engine(trainer: Trainer) -> Iterator[VllmEngine]:
    """With weights of its own for each test."""
    engine = engine_of(trainer)
    change_weights(trainer)
    engine.update_weights(engine._version + 1)
    return engine


def test_after_a_training_step_the_engine_is_the_new_model(trainer: Trainer) -> None:
    engine = engine_of(trainer)
    assert {response.weight_version for [response] in engine.generate(make_requests(PROMPTS, 1), Sampling(4))} == {0}
    metrics = engine.update_weights(1)
    assert metrics["sync/logprob_gap_max"] < 1e-4
    assert_answers_are_the_policys(engine, trainer.policy)
    assert {response.weight_version for [response] in engine.generate(make_requests(PROMPTS, 1), Sampling(4))} == {1}
    assert engine.update_weights(1) == metrics


def test_equal_arguments_give_equal_responses(engine: VllmEngine) -> None:
    first = engine.generate(
        make_requests(PROMPTS, 70, 5), Sampling(6)
    )  # more than one request to a prompt: batch_size is 64
    again = engine.generate(make_requests(PROMPTS, 70, 5), Sampling(6))
    assert [[r.token_ids for r in rs] for rs in first] == [[r.token_ids for r in rs] for rs in again]
    assert [len(responses) for responses in first] == [70] * len(PROMPTS)
    assert len({tuple(r.token_ids) for r in first[0]}) > 35
    other = engine.generate(make_requests(PROMPTS, 70, 6), Sampling(6))
    assert [r.token_ids for r in first[0]] != [r.token_ids for r in other[0]]


def test_every_eos_id_ends_a_response(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "ends", replace(engine.ends, ids=tuple(range(3, 40))))
    responses = [r for rs in engine.generate(make_requests(PROMPTS, 8, 1), Sampling(12)) for r in rs]
    assert len({r.token_ids[-1] for r in responses if not r.truncated}) > 3
    for r in responses:
        assert not any(token in engine.ends.ids for token in r.token_ids[:-1])
        assert r.truncated == (r.token_ids[-1] not in engine.ends.ids)


def test_servers_end_responses_at_stop_strings_and_never_draw_what_is_barred(engine: VllmEngine) -> None:
    prompt = [5, *range(6, 60)]
    barred = range(5, 40)
    server = engine._servers[0]
    endless, tokenizer = replace(engine.ends, ids=()), engine.ends.tokenizer
    [(free, _)] = server.generate(prompt, sampling_params(1, 40, 1.0, 3, endless))
    pairs = [free.token_ids[i : i + 2] for i in range(4, 38)]
    # Two of them that have text: not the tags, nor ids beyond the tokenizer.
    strings = [tokenizer.decode(pair) for pair in pairs if all(5 <= token < len(tokenizer) for token in pair)][:2]
    ends = replace(endless, strings=tuple(strings))
    [(ended, _)] = server.generate(prompt, sampling_params(1, 40, 1.0, 3, ends))
    length = ends.length(free.token_ids)
    assert length is not None
    assert length < len(free.token_ids) == 40
    assert (ended.token_ids, ended.truncated) == (free.token_ids[:length], False)
    assert len(ended.logprobs) == length
    assert cut(free, ends).token_ids == ended.token_ids  # what a server without the tokenizer writes

    answers = server.generate(prompt, sampling_params(8, 40, 1.0, 3, engine.ends, barred))
    assert any(token in barred for token in free.token_ids)
    assert not any(token in barred for response, _ in answers for token in response.token_ids)


def test_a_prompt_that_leaves_no_room_is_named(engine: VllmEngine) -> None:
    with pytest.raises(ValueError, match="a prompt has 600 tokens, and vLLM's model takes 512 with the response"):
        engine.generate([Request([5] * 600)], Sampling(4))
    [[response]] = engine.generate([Request([5] * 510)], Sampling(4))
    assert len(response.token_ids) <= 2


def test_prompts_that_are_too_many_for_one_pass(engine: VllmEngine) -> None:
    """None is cut in two, which would end the server (on a CPU, by an error of vLLM's)."""
    restarts = engine._restarts
    prompts = [[5, n, *[7] * 480] for n in range(6, 16)]
    assert all(len(rs) == 1 for rs in engine.generate(make_requests(prompts, 1, 1), Sampling(2)))
    assert engine._restarts == restarts


@pytest.mark.parametrize("left_out", ["weights", "head", "cache"])
def test_stale_weights_stop_the_run(
    trainer: Trainer, engine: VllmEngine, monkeypatch: pytest.MonkeyPatch, left_out: str
) -> None:
    """None of them sent; all but the head, of which vLLM has a copy; all, but what was computed with the old ones kept."""
    # A pause empties the cache, too, as long as vLLM has it so.
    skipped = {"weights": ["/collective_rpc"], "cache": ["/pause?mode=wait", "/reset_prefix_cache"]}.get(left_out, [])
    call, named = Server.call, handover.Handover._named
    with monkeypatch.context() as patch:
        patch.setattr(
            Server,
            "call",
            lambda s, m, path, *a, **k: (
                {"success": True, "results": []} if path in skipped else call(s, m, path, *a, **k)
            ),
        )
        if left_out == "head":
            patch.setattr(
                handover.Handover, "_named", lambda s: {k: v for k, v in named(s).items() if k != "lm_head.weight"}
            )
        change_weights(trainer)
        trainer.state.step = engine._version + 1
        with pytest.raises(StaleWeightsError, match="stale or wrong weights"):
            trainer.train_step()
    engine.update_weights(engine._version + 2)
    assert_answers_are_the_policys(engine, trainer.policy)


def test_a_server_with_a_long_queue_is_left_in_peace(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests wait there, and are answered, for longer than the time limit, which a server that works never hears of."""
    before, ask, took = engine.update_weights(engine._version), Server.generate, []

    def timed(server: Server, *request: Any) -> Any:
        begun = time.monotonic()
        answer = ask(server, *request)
        took.append(time.monotonic() - begun)
        return answer

    monkeypatch.setattr(Server, "generate", timed)
    arguments = make_requests(PROMPTS * 8, 8, 9), Sampling(300)
    expected = engine.generate(*arguments)
    limit = max(took) / 1.5  # the machine has more to do at times: it may be half as fast now
    took.clear()
    monkeypatch.setattr(engine, "_servers", [replace(server, timeout=limit) for server in engine._servers])
    answers = engine.generate(*arguments)
    assert [[r.token_ids for r in rs] for rs in answers] == [[r.token_ids for r in rs] for rs in expected]
    assert max(took) > limit
    after = engine.update_weights(engine._version)
    for metric in ("engine/restarts", "engine/reissued"):
        assert after[metric] == before[metric]


def test_a_folder_that_a_server_does_not_see_is_named(trainer: Trainer, engine: VllmEngine) -> None:
    with pytest.raises(
        RefusedError, match=r"does not see /nowhere/weights, .* rollout.vllm.weights_dir .* to broadcast"
    ):
        handover.read_from(Path("/nowhere/weights"), engine._servers[0])
    engine.update_weights(engine._version + 1)
    assert_answers_are_the_policys(engine, trainer.policy)


@pytest.mark.parametrize(("key", "ours", "theirs"), [("num_hidden_layers", 9, 2), ("hidden_size", 48, 64)])
def test_a_server_of_another_model_is_named(
    trainer: Trainer, engine: VllmEngine, key: str, ours: int, theirs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    [server] = engine._servers
    SameModel(trainer.policy)(server)
    monkeypatch.setattr(trainer.policy.lm.config, key, ours)
    with pytest.raises(RefusedError, match=rf"another model than the one that is trained: [a-z ]+ {theirs} for {ours}"):
        SameModel(trainer.policy)(server)


class Proxy(BaseHTTPRequestHandler):
    """Stands in for a vLLM that breaks and is mended: hands requests on to the real one, or answers 500."""

    server: Door

    def do_GET(self) -> None:
        self.answer(None)

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers.get("content-length", 0))))

    def answer(self, body: bytes | None) -> None:
        status, text = 500, b"out of luck"
        if not self.server.broken:
            connection, _ = _connect(self.server.target, 60)
            connection.request(self.command, self.path, body, {"content-type": "application/json"})
            reply = connection.getresponse()
            status, text = reply.status, reply.read()
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


class Door(ThreadingHTTPServer):
    broken = False

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), Proxy)
        self.target = target

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def door_to(engine: VllmEngine) -> Iterator[Door]:
    door = Door(engine._servers[0].address)
    threading.Thread(target=door.serve_forever).start()
    try:
        yield door
    finally:
        door.shutdown()
        door.server_close()


def test_a_server_that_answers_500_is_taken_out_and_admitted_again(
    trainer: Trainer, engine: VllmEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine._keepers[0], "_tend", lambda: None)  # else two trainers would fight over the server
    expected = [r.token_ids for [r] in engine.generate(make_requests(PROMPTS, 1, 3), Sampling(12))]
    with door_to(engine) as first, door_to(engine) as second:
        addresses = [first.address, second.address]
        config = vllm_config(tmp_path, tmp_path, addresses=addresses, start_timeout=30).rollout
        visitor = VllmEngine(config, trainer.policy, trainer.chat, tmp_path)
        try:
            second.broken = True
            with pytest.raises(ServerError, match="answered 500: out of luck"):
                visitor.config = config.vllm.model_copy(update={"start_timeout": 2})
                visitor.update_weights(0)
            second.broken = False
            visitor.update_weights(0)
            second.broken = True
            visitor.update_weights(1)  # one is enough
            assert [r.token_ids for [r] in visitor.generate(make_requests(PROMPTS, 1, 3), Sampling(12))] == expected
            assert visitor._reissued > 0
            first.broken = True
            threading.Timer(2.0, setattr, [second, "broken", False]).start()
            visitor.config = config.vllm
            assert [r.token_ids for [r] in visitor.generate(make_requests(PROMPTS, 1, 3), Sampling(12))] == expected
            second.broken = True
            visitor.config = config.vllm.model_copy(update={"start_timeout": 1})
            begun = time.monotonic()
            with pytest.raises(ServerError, match=r"no vLLM server has answered .* answered 500: out of luck"):
                visitor.generate(make_requests(PROMPTS, 1, 3), Sampling(12))
            assert time.monotonic() - begun < 30
        finally:
            visitor.close()
        assert not visitor._handover.folder.exists()
    monkeypatch.undo()
    change_weights(trainer)
    engine.update_weights(engine._version + 1)
    assert_answers_are_the_policys(engine, trainer.policy)


def test_a_server_killed_during_a_request_is_replaced_and_asked_again(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = make_requests(PROMPTS * 4, 8, 9), Sampling(300)
    expected = [[r.token_ids for r in rs] for rs in engine.generate(*arguments)]
    before = engine.update_weights(engine._version)
    left = Left.of(engine)
    ask, asked = Server.generate, itertools.count()

    def killed_once(server: Server, *request: Any) -> Any:
        if next(asked) == 3:  # three requests are under way, and this one is about to be
            kill_worker(engine)
        return ask(server, *request)

    monkeypatch.setattr(Server, "generate", killed_once)
    answers = engine.generate(*arguments)
    assert [[r.token_ids for r in rs] for rs in answers] == expected
    assert {r.weight_version for rs in answers for r in rs} == {engine._version}
    after = engine.update_weights(engine._version)
    assert after["engine/restarts"] == before["engine/restarts"] + 1
    assert after["engine/reissued"] > before["engine/reissued"]
    assert not left.processes()
    assert not any(path.exists() for path in left.paths - left.folders)


@pytest.mark.parametrize(
    ("transfer", "name", "value"), [("file", "dtype", "float16"), ("broadcast", "worker_extension_cls", "mine.Worker")]
)
def test_options_that_are_ours_are_refused(tmp_path: Path, transfer: str, name: str, value: str) -> None:
    model = save_model(tmp_path / "model", tied=True)
    config = vllm_config(tmp_path / "run", model, transfer=transfer, options={name: value})
    with pytest.raises(ConfigError, match=f"rollout.vllm.options: {name}: set by tbrm; leave it out"):
        Trainer(config)


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(RefusedError, match=rf"it is vLLM {re.escape(version)}; wants vllm>=0.32,<0.34"):
        check_version(version, "it")
    check_version("0.33.1rc1", "it")
