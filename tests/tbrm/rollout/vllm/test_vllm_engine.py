"""What an engine of servers says of them, and refuses, with a small HTTP server in vLLM's place."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tbrm.config.recipe import config_to_dict
from tbrm.config.section import ConfigError
from tbrm.config.vllm import VllmConfig
from tbrm.parallel import World
from tbrm.policy.tiny import tiny_tokenizer
from tbrm.reporting import progress
from tbrm.rollout import Request, Sampling
from tbrm.rollout.vllm import engine as engine_module
from tbrm.rollout.vllm.colocated import ColocatedEngine
from tbrm.rollout.vllm.connection import RefusedError, ServerError, headers_from_environment
from tbrm.rollout.vllm.engine import VllmEngine
from tbrm.rollout.vllm.same_model import SameModel
from tbrm.rollout.vllm.server import Server
from tbrm.training.trainer import Trainer
from tests.tbrm.conftest import tiny_config
from tests.tbrm.rollout.vllm.fake_server import NOT_FOUND, Answer, Fake, busy
from tests.tbrm.rollout.vllm.vllm_runs import vllm_config


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


def test_who_waits_for_servers_is_told_what_is_waited_for_and_how_long_already(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def none_comes(*_: Any, **__: Any) -> None:
        time.sleep(0.5)
        raise ServerError("it did not start")

    monkeypatch.setattr(progress, "LOG_SECONDS", 0.1)
    monkeypatch.setattr(engine_module, "publish", none_comes)
    address = "http://127.0.0.1:9"
    for addresses, where in (([address], address), ([], f"what it says is in {tmp_path}")):
        config = tiny_config(tmp_path, rollout__engine="vllm", rollout__vllm={"addresses": addresses}).rollout
        engine = VllmEngine(config, trainer.policy, trainer.chat, tmp_path)
        with pytest.raises(ServerError):
            engine._publish(0)
        assert f"waiting for vLLM ({where}): 0 s\n" in capfd.readouterr().err


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
