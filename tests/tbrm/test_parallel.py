"""Real processes (gloo) against one: the same losses, the same gradients, the same runs."""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tbrm.commands.cli import main
from tbrm.config.recipe import load_config
from tbrm.config.section import ConfigError
from tbrm.policy.tiny import tiny_tokenizer
from tbrm.processes.launch import launched
from tbrm.reporting.metrics import is_timing, read_jsonl
from tbrm.training.export import export
from tests.tbrm.conftest import ARCHITECTURES
from tests.tbrm.conftest import TINY as RECIPE
from tests.tbrm.parallel_steps import COMPILED_ON, MICRO_BATCHES, MODELS, MODELS_OF
from tests.tbrm.started import forked

COUNTS = (2, 4)
MODEL_ON = [(model, count) for count in COUNTS for model in MODELS_OF[count]]
DIVIDED_ON = [("", 1), *((vocabulary, count) for count in COUNTS for vocabulary in ("", ", vocabulary divided"))]


def on_processes(*settings: str) -> list[tuple[str, int]]:
    return [
        (setting, count)
        for setting in settings
        for count in (1, *COUNTS)
        if "compiled" not in setting or count in COMPILED_ON
    ]


def write_models(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    for name in MODELS:
        architecture, head = name.split("-")
        config = copy.deepcopy(ARCHITECTURES[architecture])
        config.vocab_size = len(tokenizer)  # 101: no number of processes divides it
        config.tie_word_embeddings = head == "tied"
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(config)
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        lm.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def write_trajectories(folder: Path) -> None:
    """Uneven lengths, shared prompts, one response longer than a micro-batch."""
    rng = random.Random(0)
    rows = []
    for problem in range(8):
        prompt = [1, 2] + [rng.randrange(3, 97) for _ in range(rng.randrange(1, 12))]
        for sample in range(4):
            length = 140 if (problem, sample) == (3, 2) else rng.randrange(1, 30)
            response = [rng.randrange(3, 97) for _ in range(length)]
            rows.append({"prompt_ids": prompt, "response_ids": response, "reward": rng.random()})
    (folder / "trajectories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What `processes.py` found, by number of processes."""
    folder = tmp_path_factory.mktemp("steps")
    write_models(folder)
    write_trajectories(folder)
    for count in (1, *COUNTS):
        forked(count, "tests.tbrm.parallel_steps", folder)
    return {count: torch.load(folder / f"{count}.pt") for count in (1, *COUNTS)}


def assert_same_step(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float = 1e-4) -> None:
    for key in ("loss", "residual_mean", "value_mean", "entropy_mean", "grad_norm"):
        assert ours["metrics"][key] == pytest.approx(theirs["metrics"][key], rel=tolerance, abs=1e-5), key
    assert ours["gradients"].keys() == theirs["gradients"].keys()
    for name, gradient in ours["gradients"].items():
        expected = theirs["gradients"][name]
        assert (gradient - expected).norm() <= tolerance * expected.norm() + 1e-6, name


@pytest.mark.parametrize(("model", "processes"), MODEL_ON)
@pytest.mark.parametrize("vocabulary", ["", ", vocabulary divided"])
@pytest.mark.parametrize("micro_batches", MICRO_BATCHES)
def test_loss_and_gradients_do_not_depend_on_processes_or_micro_batches(
    steps: dict[int, dict[str, Any]], model: str, vocabulary: str, micro_batches: int, processes: int
) -> None:
    whole = steps[1][f"{model}, 1 micro-batches"]
    assert whole["metrics"]["loss"] > 0
    for count, divided in ((1, ""), (processes, vocabulary)):
        step = steps[count][f"{model}{divided}, {micro_batches} micro-batches"]
        assert_same_step(step, whole)
        assert step["largest_log_ratio"] == 0.0  # of every trajectory, exactly
        assert step["passes"] == micro_batches


@pytest.mark.parametrize(("model", "processes"), MODEL_ON)
def test_with_its_vocabulary_divided_no_process_holds_a_whole_head(
    steps: dict[int, dict[str, Any]], model: str, processes: int
) -> None:
    assert steps[processes][f"{model}, whole heads"] > 0
    assert steps[processes][f"{model}, vocabulary divided, whole heads"] == 0


@pytest.mark.parametrize(
    ("setting", "processes"),
    on_processes(
        "shard in pairs",
        "reduce every micro-batch",
        "keep gathered",
        "checkpointed activations",
        "vocabulary divided in pairs",
        "vocabulary divided, all else too",
        "compiled",
    ),
)
def test_no_setting_changes_the_step(steps: dict[int, dict[str, Any]], setting: str, processes: int) -> None:
    whole = steps[1]["qwen3-tied, 1 micro-batches"]
    assert_same_step(steps[processes][setting], whole)
    assert_same_step(steps[processes][f"{setting}, once more"], whole)


@pytest.mark.parametrize(("setting", "processes"), on_processes("", ", vocabulary divided", ", compiled"))
def test_adapters_the_heads_too_learn_the_same_on_any_number_of_processes(
    steps: dict[int, dict[str, Any]], setting: str, processes: int
) -> None:
    for when in ("", ", later"):
        ours = steps[processes][f"adapters{setting}{when}"]
        assert_same_step(ours, steps[1][f"adapters{when}"])
        assert (ours["largest_log_ratio"] == 0.0) == (when == "")
        idle = {name for name, gradient in ours["gradients"].items() if not gradient.any()}
        # Until B is something else than zero, A has no say.
        assert idle == {name for name in ours["gradients"] if "lora_A" in name and when == ""}
        assert len(ours["gradients"]) == 2 * (3 + 3 + 1)


@pytest.mark.parametrize("processes", COUNTS)
@pytest.mark.parametrize("vocabulary", ["", ", vocabulary divided"])
@pytest.mark.parametrize("batch", ["one trajectory", "all but one masked", "all masked"])
def test_a_process_with_nothing_to_do_adds_nothing_and_hangs_nobody(
    steps: dict[int, dict[str, Any]], batch: str, vocabulary: str, processes: int
) -> None:
    ours = steps[processes][batch + vocabulary]
    assert_same_step(ours, steps[1][batch])
    if batch == "all but one masked":
        assert_same_step(ours, steps[1]["one trajectory"])
    if batch == "all masked":
        assert ours["metrics"]["loss"] == 0.0


@pytest.mark.parametrize(("vocabulary", "processes"), DIVIDED_ON)
def test_a_loss_that_is_not_finite_anywhere_is_skipped_everywhere(
    steps: dict[int, dict[str, Any]], vocabulary: str, processes: int
) -> None:
    assert steps[processes]["one not finite" + vocabulary]["metrics"]["skipped"] == 1
    assert steps[processes]["all masked" + vocabulary]["metrics"]["skipped"] == 0


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("parallel.shard=2", "parallel.shard: got 2 for 1 processes; wants 0 or a divisor of 1"),
        ("parallel.cpu_offload=true", "parallel.cpu_offload: true; wants torchrun .* and a GPU"),
        ("parallel.offload_reference=true", "parallel.offload_reference: true; wants torchrun .* and a GPU"),
    ],
)
def test_keys_that_cannot_work_here_are_refused(key: str, message: str) -> None:
    config = load_config(RECIPE, [key])
    with pytest.raises(ConfigError, match=message), launched(config.model, config.parallel):
        pass


@pytest.mark.parametrize("processes", COUNTS)
@pytest.mark.parametrize("vocabulary", ["", ", vocabulary divided"])
def test_bfloat16_is_as_near_float32_as_in_one_process(
    steps: dict[int, dict[str, Any]], vocabulary: str, processes: int
) -> None:
    """No further from float32 than one process is in bfloat16, and a little."""
    exact, alone = steps[1]["qwen3-tied, 1 micro-batches"], steps[1]["bfloat16"]
    ours = steps[processes][f"bfloat16{vocabulary}"]

    def error(step: dict[str, Any]) -> float:
        gaps = [step["gradients"][name] - gradient for name, gradient in exact["gradients"].items()]
        return torch.cat([gap.flatten() for gap in gaps]).norm().item()

    assert 0 < error(ours) <= 1.2 * error(alone)
    assert all(gradient.dtype is torch.float32 for gradient in ours["gradients"].values())
    assert ours["metrics"]["loss"] == pytest.approx(exact["metrics"]["loss"], rel=1e-3)
    assert ours["largest_log_ratio"] == 0.0


@pytest.mark.parametrize("processes", COUNTS)
def test_the_heads_weight_is_gathered_once_a_pass_whatever_the_chunks(
    steps: dict[int, dict[str, Any]], processes: int
) -> None:
    found = steps[processes]["gathers"]
    assert found["chunks"] > 5
    assert found["head"] == 2  # once for the reference, once for the policy's forward and backward
    assert found["blocks"] == 3 * found["n_blocks"]  # forward of both, backward of the policy


@pytest.mark.parametrize(("model", "processes"), MODEL_ON)
def test_a_sharded_policy_answers_as_a_whole_one(steps: dict[int, dict[str, Any]], model: str, processes: int) -> None:
    assert steps[processes][f"{model}, greedy"] == steps[1][f"{model}, greedy"]


@pytest.mark.parametrize(
    ("model", "vocabulary", "processes"),
    [(model, vocabulary, count) for vocabulary, count in DIVIDED_ON for model in MODELS_OF[count]],
)
def test_what_is_sampled_does_not_depend_on_processes_or_on_how_many_are_written_at_once(
    steps: dict[int, dict[str, Any]], model: str, vocabulary: str, processes: int
) -> None:
    expected = steps[1][f"{model}, sampled"][64]
    assert len({tuple(ids) for responses in expected for ids in responses}) > 20  # of 24: equal prompts differ too
    assert list(steps[processes][f"{model}{vocabulary}, sampled"].values()) == [expected, expected]


SHORT = (
    "task={name: echo}",
    "trainer.steps=4",
    "rollout.prompts=6",
    "rollout.samples=2",
    "checkpoint.every=2",
    "evaluation.prompts=5",
)
REPLAYED = (
    "objective.name=reval",
    "objective.beta=0.05",
    "objective.centre_rewards=true",
    "objective.reset_reference_every=1",
    "replay.capacity=20",
    "replay.samples_per_step=6",
    "trainer.batch_tokens=60",
)


def rows(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not is_timing(k)} for row in read_jsonl(run / "metrics.jsonl")]


def go_back(run: Path, copy_to: Path, step: int) -> Path:
    """A copy of a run that looks as if it had been killed after a step."""
    shutil.copytree(run, copy_to, symlinks=True)
    link = copy_to / "checkpoints" / "latest"
    link.unlink()
    link.symlink_to(f"step-{step:06d}")
    return copy_to


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The latest checkpoint's, in the slices of the processes."""
    files = (run / "checkpoints" / "latest").glob("*.safetensors")
    return {f"{path.name}/{name}": tensor for path in files for name, tensor in load_file(path).items()}


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("divided", ["false", "true"])
def test_a_run_repeats_itself_and_resumes_bit_for_bit(divided: str, tmp_path: Path) -> None:
    """With replay, a reference that moves on, and sharded checkpoints of both; the vocabulary divided or not."""
    run = tmp_path / "run"
    train = ("tbrm", "train", RECIPE, *SHORT, *REPLAYED, f"parallel.vocab_parallel={divided}")
    done = forked(2, *train, f"run.dir={run}")
    assert done.stdout.count("held-out accuracy") == 2  # the main process alone speaks
    whole = rows(run)
    assert [row["step"] for row in whole] == [1, 2, 3, 4]
    assert whole[0]["log_ratio_mean"] == 0.0
    assert len(list((run / "checkpoints" / "latest").glob("shard-*.safetensors"))) == 2

    again = go_back(run, tmp_path / "again", step=2)
    forked(2, *train, f"run.dir={again}", "--resume")
    assert rows(again) == whole
    assert read_jsonl(again / "eval.jsonl") == read_jsonl(run / "eval.jsonl")
    assert_same_weights(again, run)


@pytest.mark.parametrize("divided", ["false", "true"])
def test_a_run_of_three_processes_resumes_on_two_and_is_that_of_one(divided: str, tmp_path: Path) -> None:
    settings = (*SHORT, *REPLAYED[:4], "trainer.batch_tokens=200", f"parallel.vocab_parallel={divided}")
    train = ("tbrm", "train", RECIPE, *settings)
    run, alone = tmp_path / "run", tmp_path / "alone"
    forked(3, *train, f"run.dir={run}", "rollout.batch_size=4")
    main([*map(str, train[1:-1]), f"run.dir={alone}"])
    resumed = go_back(run, tmp_path / "resumed", step=2)
    forked(2, *train, f"run.dir={resumed}", "--resume")
    assert rows(resumed)[:2] == rows(run)[:2]
    for other in (resumed, alone):
        assert read_jsonl(other / "eval.jsonl") == read_jsonl(run / "eval.jsonl")
        for ours, theirs in zip(rows(other), rows(run), strict=True):
            assert ours == {key: pytest.approx(value, rel=1e-5, abs=1e-6) for key, value in theirs.items()}

    # What three processes wrote is a model for the commands of one, and a Hugging Face folder after export.
    export(str(run), tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").state_dict()
    slices = [load_file(path) for path in sorted((run / "checkpoints" / "latest").glob("shard-*.safetensors"))]
    for name in slices[0]:
        assert torch.equal(exported[name], torch.cat([part[name] for part in slices if name in part]))


@pytest.mark.parametrize(
    "objective",
    [
        ("objective.name=tbrm", "objective.value=learned", "objective.beta=auto"),
        ("objective.name=grpo", "rollout.updates=2", "rollout.importance=truncated"),
        ("objective.name=ppo", "rollout.updates=2", "critic.learning_rate=1e-3"),
    ],
    ids=lambda keys: "-".join(keys[:2]),
)
def test_what_looks_at_a_whole_step_or_has_a_critic_trains_on_two_processes_as_on_one(
    objective: tuple[str, ...], tmp_path: Path
) -> None:
    train = ("tbrm", "train", RECIPE, *SHORT, "trainer.batch_tokens=60", *objective)
    for count in (1, 2):
        forked(count, *train, f"run.dir={tmp_path / str(count)}")
    one, two = rows(tmp_path / "1"), rows(tmp_path / "2")
    assert len(one) == 4
    for ours, theirs in zip(two, one, strict=True):
        assert ours == {key: pytest.approx(value, rel=1e-4, abs=1e-5) for key, value in theirs.items()}


def test_a_run_with_adapters_resumes_bit_for_bit_and_is_one_file(tmp_path: Path) -> None:
    write_models(tmp_path)
    run = tmp_path / "run"
    lora = (f"model.name={tmp_path / 'qwen3-untied'}", "lora.rank=4", "lora.targets=[v_proj, lm_head]")
    train = ("tbrm", "train", RECIPE, *SHORT, *lora, "trainer.batch_tokens=60", "parallel.vocab_parallel=true")
    forked(2, *train, f"run.dir={run}")
    assert rows(run)[0]["log_ratio_mean"] == 0.0
    assert [path.name for path in (run / "checkpoints" / "latest").glob("*.safetensors")] == [
        "adapter_model.safetensors"
    ]
    again = go_back(run, tmp_path / "again", step=2)
    forked(2, *train, f"run.dir={again}", "--resume")
    assert rows(again) == rows(run)
    assert_same_weights(again, run)
