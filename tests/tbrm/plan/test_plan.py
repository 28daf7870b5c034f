"""`tbrm plan` against what real runs hold: measured peaks, the slices in their checkpoints, what autograd saves."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tbrm.config.model import ModelConfig
from tbrm.config.schema import Config
from tbrm.config.section import ConfigError
from tbrm.plan import PHASES, make_plan, peaks
from tbrm.plan.attention import planned_attention
from tbrm.plan.footprint import footprint
from tbrm.plan.report import changes, largest_budget
from tbrm.policy.flash_attention import VARLEN_ATTENTION
from tbrm.policy.model import PolicyModel
from tbrm.policy.packed_attention import PACKED_ATTENTION
from tbrm.policy.tiny import tiny_tokenizer
from tbrm.reporting.metrics import read_jsonl
from tbrm.trajectories.packing import pack
from tbrm.trajectories.trajectory import Trajectory
from tests.tbrm.conftest import ARCHITECTURES, make_lm, tiny_config
from tests.tbrm.started import forked

MIB = 2**20
# Odd first dimensions, which no number of processes divides.
ODD = {"vocab_size": 32771, "hidden_size": 256, "intermediate_size": 1021, "num_hidden_layers": 6}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 million parameters, untied."""
    folder = tmp_path_factory.mktemp("plan") / "model"
    config = Qwen3Config(
        **ODD,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def config_of(folder: Path, model: Path, **settings: Any) -> Config:
    cpu = {"device": "cpu", "precision": "float32"}
    return tiny_config(
        folder,
        model={"name": str(model), **cpu},
        rollout={"prompts": 32, "samples": 4, "max_new_tokens": 8},
        trainer={"steps": 2, "batch_tokens": 400},
        evaluation={"prompts": 0},
        **settings,
    )


@pytest.mark.parametrize(("processes", "parallel"), [(1, {}), (2, {}), (2, {"vocab_parallel": True})])
def test_a_real_run_takes_what_was_planned(
    model: Path, idle_mib: float, tmp_path: Path, processes: int, parallel: dict[str, Any]
) -> None:
    config = config_of(tmp_path / "run", model, parallel=parallel)
    plan = make_plan(config, processes)
    assert plan.peak() / MIB == pytest.approx(measured_mib(config, tmp_path, processes, idle_mib), rel=0.15)

    # The parts that are exact, by the checkpoint: each process wrote its slices.
    latest = tmp_path / "run/checkpoints/latest"
    weights = [elements(file) for file in latest.glob("*.safetensors")]
    moments = [elements(file) for file in latest.glob("trainer/optimizer/*.safetensors")]
    sizes = {term.name: term.size for term in plan.terms()}
    assert len(weights) == processes
    assert sizes["weights, float32"] == sizes["gradients, float32"] == 4 * max(weights)
    # Beside the moments, AdamW counts the steps of each weight.
    assert sizes["AdamW's moments, float32"] == pytest.approx(4 * max(moments), abs=4 * 4 * len(plan.sizes.shapes))


@pytest.mark.parametrize(("processes", "targets"), [(1, ["q_proj", "down_proj"]), (2, ["q_proj", "lm_head"])])
def test_a_run_with_adapters_takes_what_was_planned(
    model: Path, idle_mib: float, tmp_path: Path, processes: int, targets: list[str]
) -> None:
    config = config_of(tmp_path / "run", model, lora={"rank": 8, "targets": targets})
    plan = make_plan(config, processes)
    assert plan.peak() / MIB == pytest.approx(measured_mib(config, tmp_path, processes, idle_mib), rel=0.15)

    adapters = elements(tmp_path / "run/checkpoints/latest/adapter_model.safetensors")
    sizes = {term.name: term.size for term in plan.terms()}
    assert "reference, float32" not in sizes
    assert sizes["gradients, float32"] == pytest.approx(4 * adapters / processes, rel=0.01)


@pytest.fixture(scope="module")
def idle_mib() -> float:
    """What a process holds that has imported all that a run imports."""
    said = python("-c", "import tbrm.training.trainer; print(open('/proc/self/status').read())")
    return int(next(line.split()[1] for line in said.splitlines() if line.startswith("VmHWM"))) / 1024


def measured_mib(config: Config, folder: Path, processes: int, idle_mib: float) -> float:
    """The peak of the run's largest process, beyond that of an idle one."""
    (folder / "recipe.yaml").write_text(config.model_dump_json())
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    python(*(launcher if processes > 1 else []), "-m", "tbrm", "train", folder / "recipe.yaml")
    measured: float = read_jsonl(folder / "run/metrics.jsonl")[-1]["peak_memory_mib"] - idle_mib
    assert measured > 150  # or the check would be of what every process holds
    return measured


def python(*arguments: str | Path) -> str:
    # glibc gives back all that is freed: the plan counts what is alive.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def elements(file: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(file).values())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_the_footprint_is_what_autograd_saves(architecture: str, precision: torch.dtype) -> None:
    trajectories = [Trajectory([3, 4, 5 + i], [6, 7, 8, 9], 0.0) for i in range(8)]
    policy = PolicyModel(make_lm(architecture, tied=True), precision=precision)
    batch = pack(trajectories)
    saved = {}
    weights = {weight.untyped_storage().data_ptr() for weight in [*policy.parameters(), *policy.buffers()]}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), policy.autocast():
        batch.inputs.run(policy.lm)
    real = sum(size for where, size in saved.items() if where not in weights)

    with torch.device("meta"):
        twin = PolicyModel(type(policy.lm)(ARCHITECTURES[architecture]), precision=precision)
    found = footprint(twin, trajectories[:4])
    assert found.kept(len(batch.inputs.input_ids)) == pytest.approx(real, rel=0.1)
    assert found.kv_per_token == 2 * 3 * 2 * 8 * precision.itemsize  # keys and values of 3 layers, 2 heads of 8


def test_phases_terms_and_what_makes_them_smaller(model: Path, tmp_path: Path) -> None:
    plan = make_plan(config_of(tmp_path, model, parallel={"accumulate_sharded": False}), 2)
    held = peaks(plan.terms())
    assert list(held) == list(PHASES)
    assert plan.peak() == max(held.values())
    for budget in (100, 400):
        assert plan.peak(budget) <= plan.peak(plan.work.tokens) + 4 * plan.sizes.total
    found = changes(plan, plan.peak() - 1)
    assert {"parallel.activation_checkpointing=true", "parallel.accumulate_sharded=true", "--gpus 4"} <= {
        change.what for change in found
    }
    assert [change.peak for change in found] == sorted(change.peak for change in found)
    assert all(change.peak < plan.peak() for change in found)
    fewer = plan.config.rollout.model_copy(update={"batch_size": 16})
    smaller = replace(plan, config=plan.config.model_copy(update={"rollout": fewer}))
    assert peaks(smaller.terms())["rollout"] < held["rollout"]


def test_the_largest_budget_fits_and_a_larger_one_does_not(model: Path, tmp_path: Path) -> None:
    plan = make_plan(config_of(tmp_path, model), 1)
    everything = plan.work.tokens
    assert largest_budget(plan, plan.peak(everything)) == everything
    assert largest_budget(plan, plan.peak(plan.work.longest) - 1) is None
    memory = (plan.peak(everything) + plan.peak(plan.work.longest)) / 2
    budget = largest_budget(plan, memory)
    assert budget is not None and plan.work.longest <= budget < everything
    step = -(-everything // 256)
    assert plan.peak(budget) <= memory < plan.peak(budget + step)


@pytest.mark.parametrize(("architecture", "device", "head_dim", "planned"), [
    ("qwen2", "cuda", 64, VARLEN_ATTENTION),
    ("gemma2", "auto", 64, "tbrm_planned_flex"),
    ("gemma3", "cuda", 512, PACKED_ATTENTION),
    ("qwen2", "cpu", 64, PACKED_ATTENTION),
])  # fmt: skip
def test_attention_is_planned_as_the_device_will_have_it(
    architecture: str, device: str, head_dim: int, planned: str
) -> None:
    settings = copy.deepcopy(ARCHITECTURES[architecture])
    settings.head_dim = head_dim
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(settings)
    config = ModelConfig(name="tiny", device=device, precision="bfloat16")
    assert planned_attention(config, torch.bfloat16, lm) == planned


@pytest.mark.parametrize(("architecture", "attention", "grows"), [
    ("qwen2", VARLEN_ATTENTION, 1.0),
    ("gemma2", "tbrm_planned_flex", 1.0),
    ("gemma2", PACKED_ATTENTION, 2.0),  # which soft-caps scores that are all in memory
])  # fmt: skip
def test_one_kernel_keeps_no_more_of_a_token_in_a_long_response(
    architecture: str, attention: str, grows: float
) -> None:
    def kept_of_a_token(response: int) -> float:
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture])
        alone = [Trajectory([3 + i, 4, 5], [6] * response, 0.0) for i in range(4)]
        return footprint(PolicyModel(lm, precision=torch.bfloat16, attention=attention), alone).kept.per_token

    assert kept_of_a_token(200) / kept_of_a_token(50) == pytest.approx(grows, rel=0.25 if grows > 1 else 0.02)


def test_a_plan_for_gpus_needs_none(model: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, model={"name": str(model)}, parallel={"cpu_offload": True})
    terms = make_plan(config, 4).terms()
    on_host = {term.name for term in terms if term.on_host}
    assert on_host == {f"{what}, float32" for what in ("weights", "reference", "AdamW's moments", "gradients")}
    assert not any("libraries" in term.name for term in terms)
    assert sum(term.size for term in terms if term.on_host) > max(peaks(terms).values()) / 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parallel": {"shard": 3}}, "parallel.shard: got 3 for 4 processes"),
        ({"parallel": {"cpu_offload": True}, "model": {"name": "tiny", "device": "cpu"}}, "parallel.cpu_offload"),
    ],
)
def test_what_cannot_be_launched_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(tiny_config(tmp_path, **settings), 4)


def judge(**_: Any) -> list[float]:
    raise AssertionError("lengths want no grades")


def test_recorded_lines_are_planned_for_without_grading_them(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "1", "response": "2", "answer": "3"}) + "\n")
    task = {"name": "file", "path": str(data), "verifier": f"{__name__}:judge"}
    config = tiny_config(tmp_path, task=task, data__trajectories=str(data), evaluation={"prompts": 0})
    assert make_plan(config, 1).peak() > 0


def test_prompts_that_are_all_too_long_are_named(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, rollout__max_prompt_tokens=1, rollout__long_prompts="drop")
    with pytest.raises(ConfigError, match=r"rollout.max_prompt_tokens: 1 is less than each prompt"):
        make_plan(config, 1)


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(tiny_config(tmp_path).model_dump_json())

    def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
        return forked(1, "tbrm", "plan", "recipe.yaml", *arguments, cwd=tmp_path, check=False)

    shown = plan("--gpus", "8", "--gpu-memory", "0.0001")
    assert shown.returncode == 0, shown.stderr
    assert "does not fit into 0.0001 GiB" in shown.stdout
    assert "saves" in shown.stdout
    data = json.loads(plan("--json", "--gpu-memory", "80", "trainer.batch_tokens=64").stdout)
    assert data["fits"] and data["changes"] == []
    assert data["peak"] == max(data["phases"].values())
    assert data["phases"]["update"] == sum(term["size"] for term in data["terms"] if "update" in term["phases"])
    assert "wants at least 1" in plan("--gpus", "0").stderr
