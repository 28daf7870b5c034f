"""The commands, each run as a user runs it."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml

from tbrm.policy.load import find_model
from tbrm.reporting.metrics import read_jsonl
from tbrm.training.checkpoint import step_of
from tests.tbrm.conftest import tiny_tree
from tests.tbrm.started import forked


def tbrm(*arguments: str | Path, cwd: Path, check: bool = True, anew: bool = False) -> subprocess.CompletedProcess[str]:
    """In a process that has imported what it needs; `anew`: that imports it, as a user's does."""
    if not anew:
        return forked(1, "tbrm", *arguments, cwd=cwd, check=check)
    command = [sys.executable, "-m", "tbrm", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=180)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module", autouse=True)
def one_thread_and_long_lines() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("COLUMNS", "200")
        yield


def taken(trained: Path) -> str:
    """The checkpoint of the run."""
    return find_model(str(trained / "run"))[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, one_thread_and_long_lines: None) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    evaluation = {"prompts": 5, "every": 2, "samples": 2, "temperature": 0.7}
    tree = tiny_tree(folder / "run", evaluation=evaluation, model__precision="bfloat16", logging={})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    done = tbrm("train", "recipe.yaml", "seed=1", cwd=folder, anew=True)
    assert "held-out accuracy" in done.stdout
    said = done.stdout.splitlines()
    assert f"{folder / 'run'} holds the run" in said
    assert said[-1] == f"report    {folder / 'run' / 'report.html'}"
    assert re.search(r"^step 1/4: \d\d:\d\d left, held-out ", done.stderr, re.MULTILINE)
    assert "\r" not in done.stderr  # no progress bar where there is no terminal
    assert yaml.safe_load((folder / "run" / "config.yaml").read_text())["seed"] == 1
    return folder


def test_train_refuses_to_overwrite_and_resume_of_a_finished_run_is_harmless(trained: Path) -> None:
    refused = tbrm("train", "recipe.yaml", cwd=trained, check=False)
    assert refused.returncode == 1
    assert "holds a run already" in refused.stderr
    before = (trained / "run" / "metrics.jsonl").read_text()
    tbrm("train", "recipe.yaml", "--resume", "seed=1", cwd=trained)  # overrides may follow options
    assert (trained / "run" / "metrics.jsonl").read_text() == before


def test_a_bad_recipe_stops_with_one_line(trained: Path) -> None:
    done = tbrm("train", "recipe.yaml", "trainer.stepz=1", cwd=trained, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "tbrm train: trainer.stepz: unknown key (value 1); did you mean trainer.steps?"


WITHOUT_TORCH = """
import sys
from tbrm.commands.cli import main
for command in (["config"], ["train"], ["plan"], ["rollout", "--out", "x"], ["eval", "tiny", "--task"]):
    for key in ("trainer.stepz", "objective.betta", "task.famly"):
        if command[0] == "eval" and key.startswith("objective"):
            continue
        assert main([*command, "recipe.yaml", key + "=1"]) == 1
        assert not {"torch", "transformers", "reasoning_gym"} & sys.modules.keys(), (command, key)
"""


def test_a_wrong_key_is_found_before_torch_is_loaded(trained: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], cwd=trained, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("unknown key") == 14
    assert "loading" not in done.stderr
    assert tbrm("config", "recipe.yaml", cwd=trained).stderr == ""


def test_what_is_loaded_is_said_first_and_once(trained: Path) -> None:
    done = tbrm("score", "tiny", "nowhere.jsonl", cwd=trained, check=False, anew=True)
    assert done.stderr.splitlines()[0] == "loading torch, transformers and tiny"
    assert done.stderr.count("loading") == 1


def test_help_and_config_show_every_key(trained: Path) -> None:
    text = tbrm("train", "--help", cwd=trained).stdout
    shown = tbrm("config", "recipe.yaml", cwd=trained).stdout
    for key in ("run.dir", "optim.learning_rate", "objective.beta", "checkpoint.every"):
        assert key in text
        assert key in shown
    assert "task.family" in shown  # the task's own keys are known once it is


def test_eval_of_a_run_evaluates_as_the_run_did(trained: Path) -> None:
    for source in ("run", Path(taken(trained))):
        said = tbrm("eval", source, "--json", "same.json", cwd=trained).stderr
        assert (f"takes {taken(trained)}, the " in said) == (source == "run")
        now = json.loads((trained / "same.json").read_text())
        step = step_of(Path(taken(trained)))
        [then] = [row for row in read_jsonl(trained / "run" / "eval.jsonl") if row["step"] == step]
        assert (then["k"], then["n"]) == (2, 5)  # and not one greedy response to each of 200
        assert {"step": step, **{key: now[key] for key in then if key != "step"}} == then
        assert now["samples"] == read_jsonl(trained / "run" / "samples" / f"step-{step:06d}.jsonl")


def test_eval_wants_a_task_of_what_is_no_run(trained: Path) -> None:
    done = tbrm("eval", "tiny", cwd=trained, check=False)
    assert done.stderr == "tbrm eval: --task: missing; tiny is not the folder of a run, whose task would be taken\n"


def test_eval_takes_a_runs_best_checkpoint(trained: Path) -> None:
    out = tbrm(
        "eval", "run", "--task", "recipe.yaml", "--prompts", "4", "--k", "3", "--json", "eval.json", cwd=trained
    ).stdout
    assert "95% interval" in out
    assert "sampled at temperature 0.7" in out  # the recipe's
    result = json.loads((trained / "eval.json").read_text())
    assert (result["n"], result["k"], len(result["samples"])) == (4, 3, 12)
    right = [sum(s["correct"] for s in result["samples"][i : i + 3]) for i in range(0, 12, 3)]
    assert result["accuracy"] == pytest.approx(sum(right) / 12)
    assert result["pass_at_k"] == sum(count > 0 for count in right) / 4


def test_problems_that_a_run_did_not_hold_out_are_told_of(trained: Path) -> None:
    evaluate = ("eval", "run", "--task", "recipe.yaml", "rollout.max_new_tokens=1", "--prompts")
    assert "not held out" not in tbrm(*evaluate, "5", cwd=trained).stderr
    said = (
        "3 of these 8 problems were not held out in run, whose evaluation.prompts was 5, and may have been trained on"
    )
    assert said in tbrm(*evaluate, "8", cwd=trained).stderr


def test_a_checkpoint_is_a_hugging_face_folder_and_so_is_what_export_makes_of_it(trained: Path) -> None:
    from transformers import AutoModelForCausalLM

    tbrm("export", "run", "exported", cwd=trained)
    checkpoint = AutoModelForCausalLM.from_pretrained(taken(trained))
    exported = AutoModelForCausalLM.from_pretrained(trained / "exported")
    assert exported.config._attn_implementation == "sdpa"
    assert exported.config.architectures == ["Qwen3ForCausalLM"]
    for name, tensor in checkpoint.state_dict().items():
        assert torch.equal(tensor, exported.state_dict()[name])
    refused = tbrm("export", "run", "exported", cwd=trained, check=False)
    assert "exported exists already" in refused.stderr
    refused = tbrm("export", "recipe.yaml", "other", cwd=trained, check=False)
    assert "recipe.yaml cannot be resumed" in refused.stderr


def test_rollout_then_score_agree_with_the_model(trained: Path) -> None:
    model = (f"model.name={taken(trained)}", "model.precision=float32")
    tbrm("rollout", "recipe.yaml", "--out", "data.jsonl", "--steps", "2", *model, cwd=trained, anew=True)
    lines = [json.loads(line) for line in (trained / "data.jsonl").read_text().splitlines()]
    assert len(lines) == 4 * 2 * 2
    tbrm(
        "score",
        "run",
        "data.jsonl",
        "--out",
        "scores.jsonl",
        "trainer.batch_tokens=50",
        "model.precision=float32",
        cwd=trained,
    )
    scores = [json.loads(line) for line in (trained / "scores.jsonl").read_text().splitlines()]
    assert [score["index"] for score in scores] == list(range(16))

    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(taken(trained))
    for line, score in zip(lines, scores, strict=True):
        tokens = torch.tensor([line["prompt_ids"] + line["response_ids"]])
        start = len(line["prompt_ids"])
        logits = lm(tokens).logits[0, start - 1 : -1].double()
        logp = logits.log_softmax(-1).gather(1, tokens[0, start:, None]).sum().item()
        assert score["logprob_sum"] == pytest.approx(logp, rel=1e-4)
        assert sum(line["response_logprobs"]) == pytest.approx(logp, rel=1e-4)
        assert score["value"] == pytest.approx(logits[0].logsumexp(-1).item(), rel=1e-4)


def test_score_reads_text_too_and_names_a_bad_line(trained: Path) -> None:
    (trained / "text.jsonl").write_text('{"prompt": "1 + 1", "response": "2", "reward": 1.0}\n')
    [line] = tbrm("score", "tiny", "text.jsonl", cwd=trained).stdout.splitlines()
    assert json.loads(line)["actions"] == 2  # the digit and the end of the response
    assert math.isfinite(json.loads(line)["logprob_sum"])
    (trained / "bad.jsonl").write_text(
        '{"prompt": "1 + 1", "response": "2", "reward": 1.0}\n{"prompt": "1", "reward": 1}\n'
    )
    done = tbrm("score", "tiny", "bad.jsonl", cwd=trained, check=False)
    assert done.returncode == 1
    assert "bad.jsonl:2: response: got None; wants text" in done.stderr


@pytest.mark.parametrize("command", [["config", "recipe.yaml"], ["train", "--help"], ["doctor"]])
def test_output_that_nobody_reads_ends_a_command_without_a_word(trained: Path, command: list[str]) -> None:
    """As `| head` does that has seen enough."""
    ours, theirs = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "tbrm", *command], cwd=trained, stdout=theirs, stderr=subprocess.PIPE, text=True
    )
    os.close(theirs)
    os.close(ours)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (141, "")


@pytest.mark.parametrize("seconds", [0.0, 0.7, 1.5])
def test_ctrl_c_while_libraries_are_loaded_ends_with_a_line(trained: Path, seconds: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tbrm", "score", "tiny", "nowhere.jsonl"],
        cwd=trained,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs start without it
    )
    assert process.stderr is not None and process.stderr.readline().startswith("loading torch, transformers")
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert said == "\ntbrm: stopped by Ctrl-C\n"
    # 130 for a shell either way: where the interrupt passed through an exec() of text, Python ends itself by the signal.
    assert process.returncode in (130, -signal.SIGINT)


def test_doctor_names_what_is_usable(trained: Path) -> None:
    text = tbrm("doctor", cwd=trained, anew=True).stdout
    assert re.search(rf"^tbrm +yes +{re.escape(version('tbrm'))}$", text, re.MULTILINE)
    assert "kernels: torch" in text
    assert "model.device auto takes" in text
    assert re.search(r"attention: varlen +(no +wants|yes)", text)
    assert re.search(r"attention: sdpa +yes", text)
    assert "vllm" in text


def test_report_of_a_run(trained: Path) -> None:
    page = trained / "run" / "report.html"
    page.unlink()  # the run has left one
    text = tbrm("report", "run", cwd=trained).stdout
    assert text.splitlines()[0].startswith("accuracy ") and text.splitlines()[-1] == "report    run/report.html"
    assert page.read_text().startswith("<!")


def test_paths_on_the_command_line_may_begin_with_a_home(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell expands `--out=~/data.jsonl`, nor what another program passes on."""
    (trained / "home").mkdir()
    monkeypatch.setenv("HOME", str(trained / "home"))
    monkeypatch.setenv("HERE", str(trained))
    tbrm("rollout", "$HERE/recipe.yaml", "--out=~/data.jsonl", cwd=trained / "home")
    assert (trained / "home" / "data.jsonl").exists()
    refused = tbrm("report", "${NOWHERE}/run", cwd=trained, check=False)
    assert "names the environment variable 'NOWHERE', which is not set" in refused.stderr


def test_a_missing_model_is_named(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # else a hub is asked
    done = tbrm("eval", "no/such-model", "--task", "recipe.yaml", cwd=trained, check=False, anew=True)
    assert done.returncode == 1
    assert "model.name: 'no/such-model' cannot be loaded" in done.stderr
    assert "Traceback" not in done.stderr
