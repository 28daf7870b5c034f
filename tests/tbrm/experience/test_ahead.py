"""Rollouts beside training. That such a run repeats itself and survives a kill bit for bit: test_trainer, test_checkpoint."""

from __future__ import annotations

import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tbrm.config.section import ConfigError
from tbrm.experience import ahead
from tbrm.experience.ahead import RolloutLateError, SupplyAhead
from tbrm.parallel import World
from tbrm.policy.ends import Ends
from tbrm.policy.model import PolicyModel
from tbrm.policy.named_weights import weights_of
from tbrm.reporting.metrics import read_jsonl
from tbrm.rollout import EmbeddedEngine, Request, Sampling
from tbrm.rollout.frozen import EngineClosed, FrozenEngine
from tbrm.rollout.split import SplitEngine
from tbrm.training import trainer as trainer_module
from tbrm.training.trainer import Trainer
from tests.tbrm.conftest import tiny_config
from tests.tbrm.training.runs import assert_same_run


def copies_of(policy: PolicyModel) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in weights_of(policy).values()]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize(
    ("max_staleness", "updates", "staleness"),
    [(1, 1, [0, 1, 1, 1, 1, 1]), (2, 1, [0, 1, 2, 2, 2, 2]), (2, 2, [0, 1, 2, 3, 2, 3]), (1, 2, [0, 1, 1, 2, 1, 2])],
)
def test_each_rollout_is_made_with_the_weights_it_says(
    tmp_path: Path, max_staleness: int, updates: int, staleness: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(
        tmp_path,
        trainer__steps=6,
        rollout__max_staleness=max_staleness,
        rollout__updates=updates,
        evaluation={"prompts": 0},
    )
    trainer = Trainer(config)
    at_version = {0: copies_of(trainer.policy)}
    answered: list[tuple[int, bool]] = []
    real = FrozenEngine.generate

    def generate(self: FrozenEngine, *arguments):
        responses = real(self, *arguments)
        [version] = {r.weight_version for group in responses for r in group}
        time.sleep(0.05)  # so that training would overtake it if it could
        answered.append((version, same(copies_of(self._copy), at_version[version])))
        return responses

    monkeypatch.setattr(FrozenEngine, "generate", generate)
    seen = []
    for step in range(1, 7):
        seen.append(trainer.train_step()["staleness_max"])
        at_version[step] = copies_of(trainer.policy)
    trainer.supply.close()
    assert seen == staleness
    assert len(answered) == 6 // updates
    assert all(equal for _, equal in answered)
    assert not same(at_version[0], at_version[5])


def test_running_ahead_by_no_step_is_the_synchronous_loop(tmp_path: Path) -> None:
    """The thread and the engine with weights of its own, and not a bit of difference."""
    Trainer(tiny_config(tmp_path / "plain")).train()
    config = tiny_config(tmp_path / "thread")
    trainer = Trainer(config)
    frozen = FrozenEngine(trainer.policy, lambda copy: EmbeddedEngine(copy, trainer.chat, 64))
    trainer.engine = trainer.supply.source.engine = frozen
    trainer.supply = SupplyAhead(
        trainer.supply.source, config.rollout, config.trainer.steps, trainer.optimisers["policy"]
    )
    trainer.train()
    assert_same_run(tmp_path / "plain", tmp_path / "thread")


def test_an_evaluation_is_of_the_weights_of_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(tiny_config(tmp_path, rollout__max_staleness=2))
    checked = []
    real = trainer_module.evaluate

    def evaluate(engine: SplitEngine, *arguments, **options):
        checked.append(same(copies_of(engine.engine._copy), copies_of(trainer.policy)))
        return real(engine, *arguments, **options)

    monkeypatch.setattr(trainer_module, "evaluate", evaluate)
    trainer.train()
    assert checked == [True] * 3
    assert [row["staleness_max"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 2, 2]


def test_a_failure_in_the_thread_is_the_trainers_with_its_own_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tiny_config(tmp_path, trainer__steps=50, rollout__max_staleness=2, evaluation={"prompts": 0}))
    calls = []

    def grade_until_it_breaks(problems, responses):
        calls.append(1)
        if len(calls) == 5:
            raise ZeroDivisionError("the grader broke")
        return real(problems, responses)

    real = trainer.config.task.grade
    monkeypatch.setattr(type(trainer.config.task), "grade", lambda self, *arguments: grade_until_it_breaks(*arguments))
    with pytest.raises(ZeroDivisionError, match="the grader broke") as error:
        trainer.train()
    assert "grade_until_it_breaks" in [frame.name for frame in traceback.extract_tb(error.value.__traceback__)]
    assert 2 <= trainer.state.step <= 5
    assert not trainer.supply._thread.is_alive()


def test_a_rollout_that_hangs_ends_the_run_within_the_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(
        tmp_path, trainer__steps=50, rollout__max_staleness=1, rollout__timeout=1, evaluation={"prompts": 0}
    )
    trainer = Trainer(config)
    calls, let_go = [], threading.Event()
    real = FrozenEngine.generate

    def generate(*arguments):
        calls.append(1)
        if len(calls) == 3:
            let_go.wait(120)
        return real(*arguments)

    monkeypatch.setattr(FrozenEngine, "generate", generate)
    monkeypatch.setattr(ahead, "_CLOSE_SECONDS", 0.1)
    with pytest.raises(RolloutLateError, match=r"the rollout for step [34] .* within 1 s \(rollout.timeout\)"):
        trainer.train()
    let_go.set()
    trainer.supply._thread.join(60)
    assert not trainer.supply._thread.is_alive()


def test_closing_the_engine_ends_a_generation_of_another_thread(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(tmp_path, rollout__max_staleness=1))
    trainer.engine.engine._engine.ends = Ends(trainer.tokenizer, (len(trainer.tokenizer),), 0)  # a response without end
    with ThreadPoolExecutor(1) as threads:
        generation = threads.submit(trainer.engine.generate, [Request([1, 2, 3])], Sampling(max_new_tokens=1_000_000))
        time.sleep(0.5)
        assert not generation.done()
        trainer.engine.close()
        with pytest.raises(EngineClosed):
            generation.result(60)


def test_torchrun_wants_servers(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, rollout__max_staleness=1)
    with pytest.raises(ConfigError, match=r"rollout.max_staleness: 1 under torchrun.*set rollout.engine to vllm"):
        Trainer(config, world=World(mesh=object()))
