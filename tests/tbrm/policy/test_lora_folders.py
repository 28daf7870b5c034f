"""Adapters on disk: saved, resumed, exported, and with the base and the tokens that they came with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tbrm.commands.cli import main
from tbrm.config.model import ModelConfig
from tbrm.policy.generation import generation_mode
from tbrm.policy.load import load_model
from tbrm.policy.tiny import tiny_tokenizer
from tbrm.reporting.metrics import read_jsonl
from tbrm.training.export import export
from tbrm.training.trainer import Trainer
from tests.tbrm.conftest import ARCHITECTURES, TINY, tiny_config
from tests.tbrm.policy.test_lora import TARGETS


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    config = type(ARCHITECTURES["qwen3"]).from_dict(
        ARCHITECTURES["qwen3"].to_dict()
        | {"vocab_size": len(tokenizer), "tie_word_embeddings": False, "eos_token_id": 0}
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_file_that_lacks_adapters_of_its_config_is_refused(base: Path, tmp_path: Path) -> None:
    lm = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), PeftConfig(r=2, target_modules=["q_proj", "v_proj"])
    )
    lm.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    gone = next(name for name in weights if "layers.1.self_attn.v_proj.lora_B" in name)
    weights["base_model.model.model.layers.9.self_attn.v_proj.lora_B.weight"] = weights.pop(gone)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        ValueError, match=r"missing \['.*layers\.1\.\S*v_proj\.lora_B.*, without a place \['.*layers\.9\."
    ):
        load_model(ModelConfig(name=str(tmp_path)), seed=0)


def test_a_run_saves_resumes_exports_and_is_evaluated(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def config(run: str) -> Any:
        lora = {"rank": 4, "targets": TARGETS}
        return tiny_config(
            tmp_path / run,
            model__name=str(base),
            lora=lora,
            checkpoint={"every": 2, "keep": 9},
            optim__learning_rate=0.03,
        )

    trainer = Trainer(config("run"))
    assert trainer.reference.model is trainer.policy
    trainer.train()
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["log_ratio_mean"] == 0.0 for row in rows] == [True, False, False, False]
    latest = (tmp_path / "run" / "checkpoints" / "latest").resolve()
    assert [path.name for path in latest.glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert json.loads((latest / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)

    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again, symlinks=True)
    (again / "checkpoints" / "latest").unlink()
    (again / "checkpoints" / "latest").symlink_to("step-000002")
    Trainer(config("again"), resume=True).train()
    for file in ("adapter_model.safetensors", "trainer/optimizer/model.safetensors"):
        assert (again / "checkpoints" / "latest" / file).read_bytes() == (latest / file).read_bytes()

    # peft itself reads what was saved, and says the same as the trained policy and as the export.
    ids = torch.arange(3, 15)[None]
    lm = AutoModelForCausalLM.from_pretrained(base)
    plain = lm(ids).logits
    theirs = PeftModel.from_pretrained(lm, latest).eval()(ids).logits
    with generation_mode(trainer.policy) as ours:
        torch.testing.assert_close(ours(ids).logits, theirs)
    export(str(latest), tmp_path / "exported")
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "exported")(ids).logits, theirs)
    assert (theirs - plain).abs().max() > 1e-3

    assert main(["eval", str(tmp_path / "run"), "--task", str(TINY), "--prompts", "2"]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_the_model_itself_is_in_no_checkpoint_though_scores_are_of_another_version(base: Path, tmp_path: Path) -> None:
    def config(**changed: Any) -> Any:
        lora = {"rank": 2, "targets": ["q_proj"]}
        return tiny_config(tmp_path, model__name=str(base), lora=lora, evaluation={"prompts": 0}, **changed)

    Trainer(config(trainer__steps=1)).train()
    resumed = Trainer(config(trainer__steps=2, rollout__temperature=0.9), resume=True, anyway=True)
    assert resumed.reference.version == 1
    resumed.train()
    latest = tmp_path / "checkpoints" / "latest"
    files = {str(path.relative_to(latest.resolve())) for path in latest.resolve().rglob("*.safetensors")}
    assert files == {"adapter_model.safetensors", "trainer/optimizer/model.safetensors"}
    again = Trainer(config(trainer__steps=3, rollout__temperature=0.9), resume=True)
    assert (again.reference.version, again.reference.moved) == (1, False)
    again.reference.moved = True  # an earlier version kept the model
    again.train()
    assert (latest / "trainer" / "reference").exists()
    once_more = Trainer(config(trainer__steps=4, rollout__temperature=0.9), resume=True)
    assert (once_more.reference.version, once_more.reference.moved) == (1, False)


def save_adapters(base: str, folder: Path, **settings: Any) -> None:
    """As an SFT run leaves them: with a tokenizer of their own, and a chat template that the base does not have."""
    lm = AutoModelForCausalLM.from_pretrained(base)
    if settings:
        lm.resize_token_embeddings(len(tiny_tokenizer()) + 1)
    adapted = get_peft_model(lm, PeftConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    adapted.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}<|user|>{{ message['content'] }}!{% endfor %}"
    if settings:
        tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(folder)


@pytest.fixture
def bare(base: Path, tmp_path: Path) -> Path:
    """A model without a chat template."""
    shutil.copytree(base, tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    return tmp_path / "bare"


def test_the_tokenizer_beside_adapters_is_theirs_and_goes_on_with_what_is_trained(bare: Path, tmp_path: Path) -> None:
    save_adapters(str(bare), tmp_path / "adapters")
    config = tiny_config(
        tmp_path / "run", model__name=str(tmp_path / "adapters"), trainer__steps=1, evaluation={"prompts": 0}
    )
    trainer = Trainer(config)
    [problem] = config.task.heldout(1)
    prompt = f"<|user|>{problem.prompt}!"
    assert trainer.chat.tokenizer.decode(trainer.chat.encode(problem.messages)) == prompt
    trainer.train()
    export(str(tmp_path / "run"), tmp_path / "out")
    for folder in (tmp_path / "run" / "checkpoints" / "latest", tmp_path / "out"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.apply_chat_template(list(problem.messages), tokenize=False) == prompt


def test_tokens_that_came_with_adapters_have_their_embeddings(bare: Path, tmp_path: Path) -> None:
    save_adapters(str(bare), tmp_path / "adapters", modules_to_save=["embed_tokens", "lm_head"])
    lm, tokenizer = load_model(ModelConfig(name=str(tmp_path / "adapters")), seed=0)
    more = tokenizer.convert_tokens_to_ids("<|more|>")
    assert lm.get_input_embeddings().weight.shape[0] == lm.get_output_embeddings().weight.shape[0] == more + 1
    saved = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    assert torch.equal(
        lm.get_input_embeddings().weight[more], saved["base_model.model.model.embed_tokens.weight"][more]
    )


def test_adapters_name_their_base_wherever_the_work_goes_on(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lora = {"rank": 2, "targets": ["q_proj"]}
    settings = {"trainer__steps": 1, "evaluation": {"prompts": 0}, "chat": {"plain": True}}
    config = tiny_config(tmp_path / "run", model__name="bare", lora=lora, **settings)
    trained = Trainer(config)
    trained.train()
    checkpoint = (tmp_path / "run" / "checkpoints" / "latest").resolve()
    saved = json.loads((checkpoint / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tmp_path / "bare")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    export(str(tmp_path / "run"), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()

    (tmp_path / "bare").rename(tmp_path / "moved")
    message = (
        f"holds adapters for the model in {tmp_path}/bare, which is not there: put it there again, or a link to it"
    )
    with pytest.raises(ValueError, match=message):
        export(str(tmp_path / "run"), tmp_path / "out2")
    (tmp_path / "bare").symlink_to("moved")
    export(str(tmp_path / "run"), tmp_path / "out2")


@pytest.mark.parametrize("base_path", ["../bare", "./../bare", "bare"])
def test_a_relative_base_starts_at_the_adapters_or_else_at_the_working_directory(
    base_path: str, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapters(str(bare), tmp_path / "adapters")
    path = tmp_path / "adapters" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base_path}))
    monkeypatch.chdir(tmp_path)
    load_model(ModelConfig(name="adapters"), seed=0)
    if base_path != "bare":
        monkeypatch.chdir("/")
        load_model(ModelConfig(name=str(tmp_path / "adapters")), seed=0)
    monkeypatch.chdir(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "../not/there"}))
    with pytest.raises(
        ValueError, match=r"for the model '../not/there', a relative path, which is neither in their folder"
    ):
        load_model(ModelConfig(name="adapters"), seed=0)
