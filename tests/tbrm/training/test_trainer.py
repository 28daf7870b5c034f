from __future__ import annotations

import copy
import json
import os
import signal
import string
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, GptOssConfig

from tbrm.config.schema import ConfigError, LoraConfig, ModelConfig, OptimConfig, ParallelConfig
from tbrm.experience.record import record
from tbrm.parallel import Sharding
from tbrm.policy.lora import Adapters
from tbrm.policy.model import PolicyModel
from tbrm.policy.reference import ReferenceModel
from tbrm.reporting.metrics import is_timing, read_jsonl
from tbrm.rollout import Sampling
from tbrm.rollout.evaluate import evaluate
from tbrm.training.optimizer import make_optimizer
from tbrm.training.run_writer import prepare_run_dir
from tbrm.training.schedule import learning_rate_at
from tbrm.training.trainer import Trainer
from tbrm_kernels import single_pass
from tests.tbrm.conftest import ARCHITECTURES, tiny_config, tiny_tree

REPLAY = {
    "objective": {"name": "reval", "beta": 0.05, "centre_rewards": True, "reset_reference_every": 3},
    "replay": {"capacity": 12, "samples_per_step": 4, "sampling": "residual", "max_staleness": 5},
    # Three steps to a rollout: the checkpoint of step 4 stands in the middle of one.
    "rollout__prompts": 6,
    "rollout__updates": 3,
}


AHEAD = {**REPLAY, "rollout__max_staleness": 2}


def rows(run_dir: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not is_timing(k)} for row in read_jsonl(run_dir / "metrics.jsonl")]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    files = (run_dir / "checkpoints" / "latest").glob("*.safetensors")
    return {f"{path.name}/{name}": tensor for path in files for name, tensor in load_file(path).items()}


def assert_same_run(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    assert read_jsonl(one / "eval.jsonl") == read_jsonl(other / "eval.jsonl")
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_leaves_metrics_samples_checkpoints_and_a_result(tmp_path: Path) -> None:
    result = Trainer(tiny_config(tmp_path / "run")).train()
    run = tmp_path / "run"
    lines = read_jsonl(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert list(lines[0])[:2] == ["step", "loss"]
    assert lines[0]["log_ratio_mean"] == 0.0  # exactly: the reference is the policy
    assert lines[0]["tokens_per_second"] > 0
    assert [line["step"] for line in read_jsonl(run / "eval.jsonl")] == [0, 2, 4]
    assert json.loads((run / "result.json").read_text()) == result
    assert result["n_heldout"] == 5
    assert result["accuracy_before"] is not None
    assert yaml.safe_load((run / "config.yaml").read_text())["task"]["family"] == "chain_sum"
    assert len((run / "samples" / "step-000004.jsonl").read_text().splitlines()) == 5
    assert (run / "checkpoints" / "latest").resolve().name == "step-000004"


@pytest.mark.parametrize("name", ["tbrm", "reval"])  # reval shapes rewards in its own way
def test_the_offset_is_added_to_what_the_loss_sees_of_rewards(tmp_path: Path, name: str) -> None:
    first = {}
    for offset in (0.0, 0.5):
        objective = {"name": name, "beta": 0.1, "reward_offset": offset}
        config = tiny_config(tmp_path / str(offset), objective=objective, trainer__steps=1, optim__warmup_steps=0)
        Trainer(config).train()
        first[offset] = rows(tmp_path / str(offset))[0]
    assert first[0.5]["residual_mean"] == pytest.approx(first[0.0]["residual_mean"] - 0.5 / 0.1, abs=1e-4)
    assert first[0.5]["reward_mean"] == first[0.0]["reward_mean"]


@pytest.mark.parametrize("extra", [{}, REPLAY, AHEAD], ids=["tbrm", "reval with replay", "rollouts ahead"])
def test_two_runs_are_identical(tmp_path: Path, extra: dict) -> None:
    for name in ("one", "other"):
        Trainer(tiny_config(tmp_path / name, **extra)).train()
    assert_same_run(tmp_path / "one", tmp_path / "other")
    Trainer(tiny_config(tmp_path / "third", seed=1, **extra)).train()
    assert rows(tmp_path / "third") != rows(tmp_path / "one")


DIES = textwrap.dedent(
    """
    import os, signal, sys
    from tbrm.commands.cli import main
    from tbrm.objectives.base import Objective
    from tbrm.objectives.tbrm import Tbrm
    from tbrm.objectives.reval import Reval
    calls = 0
    def deadly(real):
        def call(self, stats, batch):
            global calls
            calls += 1
            if calls == int(os.environ["DIE_AT_CALL"]):
                os.kill(os.getpid(), signal.SIGKILL)  # in the middle of a step: rollouts done, gradient half made
            return real(self, stats, batch)
        return call
    for kind in (Tbrm, Reval):
        kind.__call__ = deadly(kind.__call__)
    sys.exit(main(sys.argv[1:]))
    """
)


@pytest.mark.parametrize("extra", [{}, REPLAY, AHEAD], ids=["tbrm", "reval with replay", "rollouts ahead"])
def test_a_killed_run_resumes_to_the_same_numbers(tmp_path: Path, extra: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real SIGKILL inside step 6, after the checkpoint of step 4; the resumed run must not differ in a single bit."""
    settings = {
        "trainer__steps": 8,
        "trainer__batch_tokens": 60,
        "checkpoint__every": 2,
        "evaluation__every": 3,
        **extra,
    }
    settings["evaluation"] = {"prompts": 5, "every": 3}
    Trainer(tiny_config(tmp_path / "whole", **settings)).train()

    # Micro-batches up to and including step 5, and one more.
    calls = _count_objective_calls(tiny_config(tmp_path / "counted", **settings), 5, monkeypatch) + 1
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_tree(tmp_path / "killed", **settings)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, "-c", DIES, "train", str(recipe)],
        env={**environment, "DIE_AT_CALL": str(calls)},
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL
    assert [row["step"] for row in rows(tmp_path / "killed")] == [1, 2, 3, 4, 5]
    assert (tmp_path / "killed" / "checkpoints" / "latest").resolve().name == "step-000004"
    # What a kill can leave behind, besides: half a line and half a checkpoint.
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    (tmp_path / "killed" / "checkpoints" / ".writing-step-000006").mkdir()

    subprocess.run(
        [sys.executable, "-m", "tbrm", "train", str(recipe), "--resume"], env=environment, check=True, timeout=120
    )
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed" / "checkpoints").glob(".writing-*"))


def _count_objective_calls(config, steps: int, monkeypatch: pytest.MonkeyPatch) -> int:
    calls = []
    kind = type(config.objective)
    real = kind.__call__
    trainer = Trainer(config)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "__call__", lambda *args: calls.append(1) or real(*args))
        for _ in range(steps):
            trainer.train_step()
    trainer.supply.close()
    return len(calls)


def gradients_of_one_step(trainer: Trainer) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}

    def keep(_learning_rate: float, *, skipped: bool) -> None:
        assert not skipped
        seen.update({name: p.grad.clone() for name, p in trainer.policy.named_parameters()})

    trainer._update = keep
    trainer.train_step()
    return seen


@pytest.mark.parametrize("objective", ["tbrm", "tba"])
def test_gradients_do_not_depend_on_the_micro_batches(tmp_path: Path, objective: str) -> None:
    large, small = (
        gradients_of_one_step(Trainer(tiny_config(tmp_path, objective__name=objective, trainer__batch_tokens=tokens)))
        for tokens in (4096, 40)
    )
    for name, gradient in large.items():
        assert (small[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("objective", ["tbrm", "reval", "brm", "tba", "reinforce"])
def test_gradients_do_not_depend_on_the_chunks_of_the_head(
    tmp_path: Path, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, objective__name=objective)
    whole = gradients_of_one_step(Trainer(config))
    monkeypatch.setattr(
        single_pass, "CHUNK_BYTES_PER_VOCABULARY_ENTRY", {"cpu": 4 * 12}
    )  # 12 tokens: a trajectory or two
    for name, gradient in gradients_of_one_step(Trainer(config)).items():
        assert (whole[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


def test_training_on_a_recorded_file_improves_the_model(tmp_path: Path) -> None:
    """Offline: rollouts of the untrained model, graded once, are all that the training sees.

    The answer is always 7, which a model that types at random gets right now and then."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"prompt": c, "answer": "7"}) + "\n" for c in string.ascii_letters))
    settings = {
        "task": {"name": "file", "path": str(problems), "heldout_rows": 12, "verifier": "last_number"},
        "rollout": {"prompts": 32, "samples": 16, "max_new_tokens": 4},
        "evaluation": {"prompts": 12},
        "objective": {"name": "tbrm", "beta": 0.005},
    }
    recorded = tmp_path / "recorded.jsonl"
    assert record(tiny_config(tmp_path / "rollouts", **settings), recorded, steps=4) == 32 * 16 * 4
    config = tiny_config(tmp_path / "run", data__trajectories=str(recorded), trainer__steps=40, **settings)
    trainer = Trainer(config)

    def sampled_accuracy() -> float:
        return evaluate(
            trainer.engine, trainer.chat, config.task, trainer.heldout, k=50, sampling=Sampling(4), seed=1
        ).accuracy

    before = sampled_accuracy()
    trainer.train()
    after = sampled_accuracy()
    assert before > 0
    assert after > 3 * before, (before, after)


def test_held_out_prompts_in_a_file_are_not_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    task = tiny_config(tmp_path).task
    held_out = task.heldout(5)[0]
    path = tmp_path / "mixed.jsonl"
    lines = [
        {"prompt": held_out.prompt, "response": "1", "reward": 1},
        {"prompt": "2 + 2", "response": "4", "reward": 1},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trainer = Trainer(tiny_config(tmp_path / "run", data__trajectories=str(path)))
    assert len(trainer.supply.source.trajectories) == 1
    assert "1 of 2 left out" in capsys.readouterr().err
    path.write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(ConfigError, match=r"every problem .* is held out"):
        Trainer(tiny_config(tmp_path / "run", data__trajectories=str(path)))


def test_a_step_whose_responses_are_all_dropped_changes_nothing(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path, rollout__max_new_tokens=1, rollout__truncated="drop", rollout__prompts=1, rollout__samples=1
    )
    trainer = Trainer(config)
    before = {name: tensor.clone() for name, tensor in trainer.policy.state_dict().items()}
    metrics = trainer.train_step()
    assert metrics["trajectories"] == 0
    assert metrics["loss"] == 0.0
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.policy.state_dict().items())


def test_a_step_that_is_not_finite_is_skipped_and_the_third_in_a_row_stops_the_run(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(tmp_path, trainer__max_skipped=3))
    before = {name: tensor.clone() for name, tensor in trainer.policy.state_dict().items()}
    trainer.supply = Recorded(trainer.supply.collect(1, trainer.phases))
    with torch.no_grad():  # a weight that makes every logit, and so every loss, NaN
        norm = trainer.policy.lm.base_model.norm.weight
        kept = norm.clone()
        norm.fill_(float("nan"))
    poisoned = {name: tensor.clone() for name, tensor in trainer.policy.state_dict().items()}
    assert [trainer.train_step()["skipped"] for _ in range(2)] == [1, 1]
    same = [torch.equal(poisoned[n].nan_to_num(), t.nan_to_num()) for n, t in trainer.policy.state_dict().items()]
    assert all(same)
    with torch.no_grad():
        norm.copy_(kept)
    assert trainer.train_step()["skipped"] == 0  # a good one between: the count starts anew
    assert not torch.equal(before["lm.model.norm.weight"], norm)
    with torch.no_grad():
        norm.fill_(float("nan"))
    trainer.train_step()
    trainer.train_step()
    with pytest.raises(FloatingPointError, match=r"step 6: the loss is nan .* step number 3 in a row .*max_skipped"):
        trainer.train_step()
    [offending] = tmp_path.glob("skipped-step-000006.jsonl")
    assert len(read_jsonl(offending)) == 8


class Recorded:
    """A source that deals out the same trajectories at every step: a model of NaNs cannot generate."""

    def __init__(self, collected) -> None:
        self.collected = collected

    def collect(self, step: int, phases: object):
        return self.collected


def test_the_best_checkpoint_is_the_most_accurate_then_the_one_of_most_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tiny_config(tmp_path, trainer__steps=5, evaluation={"prompts": 1, "every": 1}))
    found = iter([(0.5, 0.5), (0.5, 0.6), (0.5, 0.6), (0.4, 0.9), (0.6, 0.1), (0.5, 0.9)])
    saved = []
    monkeypatch.setattr(trainer, "_evaluate", lambda out: next(found))
    monkeypatch.setattr(trainer, "_save", lambda best: saved.append((trainer.state.step, best)))
    result = trainer.train()
    assert [step for step, best in saved if best] == [1, 4]
    assert (result["reward_before"], result["reward_after"]) == (0.5, 0.9)


def test_weight_decay_leaves_norms_and_biases_alone(tmp_path: Path) -> None:
    after = {}
    for decay in (0.0, 0.5):
        trainer = Trainer(tiny_config(tmp_path, optim__weight_decay=decay, evaluation={"prompts": 0}))
        trainer.train_step()
        after[decay] = {name: weight.detach() for name, weight in trainer.policy.trained_weights().items()}
    changed = {name for name, weight in after[0.5].items() if not torch.equal(weight, after[0.0][name])}
    assert changed == {name for name, weight in after[0.0].items() if weight.dim() > 1}
    assert 0 < len(changed) < len(after[0.0])


def undecayed(policy: PolicyModel) -> set[str]:
    names = {weight: name for name, weight in policy.trained_weights().items()}
    groups = make_optimizer(policy, OptimConfig(weight_decay=0.1)).param_groups
    assert sum(len(group["params"]) for group in groups) == len(names)
    return {names[weight] for group in groups if group["weight_decay"] == 0 for weight in group["params"]}


def test_gains_and_biases_of_two_dimensions_are_not_decayed_either() -> None:
    """The gain of each head, [heads, D], and the bias of each expert, [experts, D]; whole, in slices, and beside adapters."""
    gains = copy.deepcopy(ARCHITECTURES["cohere"])
    gains.use_qk_norm = True
    width = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 97, "num_hidden_layers": 2}
    biases = GptOssConfig(**width, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
        for config, wide in ((gains, ("q_norm.weight", "k_norm.weight")), (biases, ("_proj_bias",))):
            policy = PolicyModel(AutoModelForCausalLM.from_config(config))
            weights = policy.trained_weights()
            expected = {name for name, weight in weights.items() if weight.dim() == 1 or name.endswith(wide)}
            assert undecayed(policy) == expected
            assert any(weights[name].dim() == 2 for name in expected)
            policy.shard(Sharding(mesh, ParallelConfig(), torch.float32))
            assert undecayed(policy) == expected
    finally:
        dist.destroy_process_group()
    lm = AutoModelForCausalLM.from_config(gains)
    adapters = Adapters(lm, LoraConfig(rank=2, targets=["q_proj"]), ModelConfig(name="base"), seed=0)
    policy = PolicyModel(lm)
    policy.adapters = adapters
    assert policy.trained_weights() and not undecayed(policy)


def test_reference_scores_are_shared_where_trajectories_come_again_and_only_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = tmp_path / "recorded.jsonl"
    recorded.write_text('{"prompt": "1", "response": "2", "reward": 1}\n')
    shared = []
    monkeypatch.setattr(ReferenceModel, "share_scores", lambda *arguments: shared.append(arguments))
    for settings, times in (
        ({}, 0),
        ({"data__trajectories": str(recorded)}, 1),
        ({"replay": {"capacity": 10, "samples_per_step": 2}}, 1),
    ):
        shared.clear()
        Trainer(tiny_config(tmp_path / "run", evaluation={"prompts": 0}, **settings)).train_step()
        assert len(shared) == times


def test_a_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match=r"holds a run already; give --resume .* --overwrite"):
        prepare_run_dir(tmp_path, resume=False, overwrite=False)
    prepare_run_dir(tmp_path, resume=True, overwrite=False)
    assert (tmp_path / "metrics.jsonl").exists()
    prepare_run_dir(tmp_path, resume=False, overwrite=True)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "mine.txt").exists()


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, trainer__steps=1, evaluation={"prompts": 0})
    Trainer(config).train()
    (tmp_path / "checkpoints" / "latest" / "trainer" / "state.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match=r"step-000001 cannot be resumed: state.json: format 99, this version reads 3"):
        Trainer(config, resume=True)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.8536, 0.5, 0.1464]),
    ],
)
def test_learning_rate(schedule: str, rates: list[float]) -> None:
    optim = OptimConfig(learning_rate=1.0, warmup_steps=2, schedule=schedule)
    assert [learning_rate_at(step, optim, 6) for step in range(1, 7)] == pytest.approx(rates, abs=1e-4)


def test_the_norm_of_no_gradients_lies_on_the_models_device(tmp_path: Path) -> None:
    """Of a step whose trajectories were all dropped; it joins sums that are there."""
    trainer = Trainer(tiny_config(tmp_path, evaluation={"prompts": 0}))
    trainer.device = torch.device("meta")
    assert trainer._clip_gradients().device.type == "meta"
