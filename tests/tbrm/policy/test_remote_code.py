"""A model that brings Python code of its own: run with model.trust_remote_code alone, and kept with what is made of it."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, dynamic_module_utils

from tbrm.commands.cli import main
from tbrm.policy.tiny import tiny_model, tiny_tokenizer
from tests.tbrm.conftest import tiny_tree

CODE = {
    "configuration_mine.py": """
        from transformers import Qwen3Config
        class MineConfig(Qwen3Config):
            model_type = "mine"
        """,
    "modeling_mine.py": """
        from pathlib import Path
        from transformers import Qwen3ForCausalLM
        from .configuration_mine import MineConfig
        from .scale_mine import SCALE
        with Path({ran!r}).open("a") as file:
            file.write("ran")
        class MineForCausalLM(Qwen3ForCausalLM):
            config_class = MineConfig
        """,
    "scale_mine.py": "SCALE = 1.0",
}
TRUSTED = "model.trust_remote_code=true"


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that the model's code writes to; transformers' copies of it are not the user's."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "ran"


def save_model_with_code(folder: Path, ran: Path) -> None:
    tokenizer = tiny_tokenizer()
    tiny_model(len(tokenizer), seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, code in CODE.items():
        (folder / name).write_text(textwrap.dedent(code).format(ran=str(ran)))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "architectures": ["MineForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_mine.MineConfig",
            "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
            "AutoModelForTokenClassification": "tagging_mine.MineForTokenClassification",  # a file that is nowhere
        },
    }
    (folder / "config.json").write_text(json.dumps(config))


def test_code_is_kept_with_checkpoints_and_exports_and_never_run_unasked(
    tmp_path: Path, ran: Path, capsys: pytest.CaptureFixture
) -> None:
    save_model_with_code(tmp_path / "model", ran)
    tree = tiny_tree(tmp_path / "run", model__name=str(tmp_path / "model"), trainer__steps=1, evaluation={"prompts": 0})
    recipe, run = tmp_path / "recipe.yaml", str(tmp_path / "run")
    recipe.write_text(yaml.safe_dump(tree))
    evaluate = ["eval", run, "--task", str(recipe), "--prompts", "2"]
    export = ["export", run, str(tmp_path / "out")]

    assert main(["train", str(recipe), "--overwrite"]) == 1
    message = "brings Python code of its own, which is not run unasked: read it, and give model.trust_remote_code=true"
    assert message in capsys.readouterr().err
    assert not ran.exists()

    assert main(["train", str(recipe), "--overwrite", TRUSTED]) == 0
    assert ran.exists()
    ran.unlink()
    for refused in (evaluate, export):  # that the run may, says nothing of this command
        assert main(refused) == 1
        assert message in capsys.readouterr().err
    assert not ran.exists()

    assert main([*evaluate, TRUSTED]) == 0
    assert main([*export, TRUSTED]) == 0
    for folder in ((tmp_path / "run" / "checkpoints" / "latest").resolve(), tmp_path / "out"):
        assert {path.name for path in folder.glob("*.py")} == set(CODE)
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        assert auto_map == {
            "AutoConfig": "configuration_mine.MineConfig",
            "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
        }
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(exported).__name__ == "MineForCausalLM"
    assert main(["train", str(recipe), "--resume", TRUSTED, "trainer.steps=2"]) == 0
