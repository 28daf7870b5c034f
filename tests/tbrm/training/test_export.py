"""What `tbrm export` writes is what was trained, for transformers 5 and 4."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from tbrm.commands.cli import main
from tbrm.policy.hub_folder import save_model
from tbrm.policy.tiny import tiny_tokenizer
from tbrm.training.trainer import Trainer
from tests.tbrm.conftest import tiny_config
from tests.tbrm.training.read_folder import read

ROOT = Path(__file__).parents[3]
OLD = ROOT / "build" / "transformers-4.57.6"
_SHAPE: dict[str, Any] = {
    "vocab_size": len(tiny_tokenizer()),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_HEAD = {"head_dim": 8}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
_THETA = {"rope_theta": 321.0}  # nobody's default
_SHORT, _LONG = [1.0, 1.1, 1.2, 1.3], [2.0, 2.1, 2.2, 2.3]


def _llama(rope_type: str, **rope: Any) -> LlamaConfig:
    return LlamaConfig(**_SHAPE, rope_parameters=_THETA | {"rope_type": rope_type, **rope}, tie_word_embeddings=True)


FAMILIES: dict[str, PreTrainedConfig] = {
    "default": _llama("default"),
    "linear": _llama("linear", factor=4.0),
    "llama3": _llama("llama3", factor=8.0, **_LLAMA3),
    "yarn": _llama("yarn", factor=4.0, original_max_position_embeddings=32),
    "longrope": Phi3Config(
        **_SHAPE,
        rope_parameters=_THETA | {"rope_type": "longrope", "short_factor": _SHORT, "long_factor": _LONG},
        original_max_position_embeddings=32,
    ),
    "partial": GPTNeoXConfig(
        **{key: value for key, value in _SHAPE.items() if key != "num_key_value_heads"},
        rope_parameters=_THETA | {"rope_type": "default", "partial_rotary_factor": 0.5},
        hidden_dropout=0.0,
        attention_dropout=0.0,
    ),
    "two-ropes": Gemma3TextConfig(
        **_SHAPE,
        **_HEAD,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=16,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 77.0},
            "full_attention": _THETA | {"rope_type": "linear", "factor": 2.0},
        },
    ),
    "experts": Qwen3MoeConfig(
        **_SHAPE,
        **_HEAD,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        rope_parameters=_THETA | {"rope_type": "default"},
    ),
}


def save_source(config: PreTrainedConfig, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """A random model, as a hub has models, whose positions matter."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config)
    for parameter in lm.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    lm.to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def train_one_step(source: Path, folder: Path, **settings: Any) -> None:
    data = folder.with_suffix(".jsonl")
    data.parent.mkdir(exist_ok=True)
    rows = [{"prompt": f"{i} + 1", "response": f"{i + 1}", "reward": i % 2} for i in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config(
        folder,
        model__name=str(source),
        data__trajectories=str(data),
        rollout__samples=1,
        trainer__steps=1,
        optim__learning_rate=1e-2,
        evaluation={"prompts": 0},
        **settings,
    )
    Trainer(config).train()


@pytest.fixture(scope="module")
def old_transformers() -> Path:
    """transformers 4.57, beside this environment's torch."""
    if OLD.exists():
        return OLD
    packages = ["transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2"]
    packages += ["requests==2.34.2", "urllib3", "idna", "certifi", "charset-normalizer"]
    unfinished = OLD.with_name(f"{OLD.name}.{os.getpid()}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(unfinished), *packages]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if "connection broken by" in done.stderr or "Network is unreachable" in done.stderr:
        pytest.skip(f"pip reaches no registry to install transformers 4.57 from: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    if not OLD.exists():
        unfinished.rename(OLD)
    return OLD


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every family: a model in bfloat16, trained for a step, and exported."""
    folder = tmp_path_factory.mktemp("exports")
    (folder / "out").mkdir()
    for name, config in FAMILIES.items():
        save_source(config, folder / "source" / name)
        train_one_step(folder / "source" / name, folder / "runs" / name)
        assert main(["export", str(folder / "runs" / name), str(folder / "out" / name)]) == 0
    return folder


def test_both_transformers_read_an_export_alike(exports: Path, old_transformers: Path) -> None:
    folders = [str(exports / "out" / name) for name in FAMILIES]
    environment = {**os.environ, "PYTHONPATH": str(old_transformers)}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("read_folder.py")), *folders],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    old = json.loads(done.stdout)
    for name in FAMILIES:
        theirs, ours = old[name], read(str(exports / "out" / name))
        assert theirs.pop("version") == "4.57.6"
        ours.pop("version")
        torch.testing.assert_close(torch.tensor(theirs.pop("logprobs")), torch.tensor(ours.pop("logprobs")))
        assert theirs == ours, name
        assert ours["dtype"] == "torch.bfloat16"


@pytest.mark.parametrize("name", FAMILIES)
def test_an_export_is_the_checkpoint_in_the_models_own_dtype(exports: Path, name: str) -> None:
    checkpoint = (exports / "runs" / name / "checkpoints" / "latest").resolve()
    trained = AutoModelForCausalLM.from_pretrained(checkpoint)
    source = AutoModelForCausalLM.from_pretrained(exports / "source" / name)
    exported = AutoModelForCausalLM.from_pretrained(exports / "out" / name)
    assert (trained.dtype, exported.dtype, source.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    moved = 0
    for key, weight in trained.state_dict().items():
        assert torch.equal(weight.bfloat16(), exported.state_dict()[key]), key
        moved += not torch.equal(exported.state_dict()[key], source.state_dict()[key])
    assert moved
    assert not hasattr(exported.config, "dtype_before_training")
    with (
        safe_open(exports / "out" / name / "model.safetensors", "pt") as file,
        safe_open(exports / "source" / name / "model.safetensors", "pt") as before,
    ):
        assert file.keys() == before.keys()


def test_another_dtype_may_be_asked_for_and_the_checkpoint_is_named(
    exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = exports / "runs" / "default"
    assert main(["export", str(run), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    taken = run / "checkpoints" / "step-000001"
    why = "it has no best, as no evaluation was better than that before training"
    said = f"{tmp_path / 'out'} is ready: a Hugging Face folder of step 1, as float32 ({taken}, the latest of {run}; {why})\n"
    assert capsys.readouterr().out == said
    weights = load_file(taken / "model.safetensors")
    assert all(
        torch.equal(weights[name], tensor) for name, tensor in load_file(tmp_path / "out/model.safetensors").items()
    )
    (run / "checkpoints" / "best").symlink_to("step-000001")
    assert main(["export", str(run), str(tmp_path / "best")]) == 0
    assert f"of step 1, as bfloat16 ({taken}, the best of {run})" in capsys.readouterr().out


def test_a_run_of_a_runs_checkpoint_still_knows_the_first_dtype(exports: Path, tmp_path: Path) -> None:
    train_one_step(exports / "runs" / "default" / "checkpoints" / "latest", tmp_path / "second")
    assert main(["export", str(tmp_path / "second"), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_values_that_a_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    lm = AutoModelForCausalLM.from_config(FAMILIES["default"])
    with torch.no_grad():
        lm.get_input_embeddings().weight[3, 0] = 70_000.0
    with pytest.raises(
        ValueError, match=r"--dtype: model.embed_tokens.weight has values beyond those of torch.float16"
    ):
        save_model(lm, tmp_path / "out", torch.float16)


def test_a_run_without_a_checkpoint_is_called_that(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 1
    assert f"{tmp_path / 'run'} is a run that has no checkpoint yet" in capsys.readouterr().err
