"""Models are read whole or not at all: as transformers reads them where it would, and refused where it would fill a gap."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Model

from tbrm.config.model import ModelConfig
from tbrm.policy.load import load_model
from tests.tbrm.conftest import ARCHITECTURES, write_model

Tensors = dict[str, Tensor]


def edited(architecture: str, edit: Callable[[Tensors], object], *, tied: bool = False) -> Callable[[Path], None]:
    """Writes a model whose file was tampered with."""

    def write(folder: Path) -> None:
        write_model(folder, architecture, tied=tied)
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return write


def without(part: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name]


def with_random(name: str, *shape: int) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: torch.randn(shape)})


def half(tensors: Tensors) -> None:
    for name in list(tensors)[::2]:
        del tensors[name]


def as_bin(folder: Path) -> None:
    write_model(folder, "llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def with_index(*files: str) -> Callable[[Path], None]:
    """In two files, and an index that names `files`."""

    def write(folder: Path) -> None:
        write_model(folder, "llama")
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = list(tensors)
        for file, part in {"a.safetensors": names[:9], "b.safetensors": names[9:]}.items():
            save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        index = {name: files[i % len(files)] for i, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))

    return write


def quantised(folder: Path) -> None:
    write_model(folder, "llama")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))


EXPERT = "model.layers.1.mlp.experts.3"
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no head": (edited("llama", without("lm_head")), "lm_head.weight missing, of 30 weights"),
    "no layer": (
        edited("qwen3", without("layers.1.")),
        "model.layers.1.self_attn.v_proj.weight, model.layers.1.self_attn.o_proj.weight and 7 more missing",
    ),
    "half": (edited("llama", half), "and 11 more missing, of 30 weights"),
    "no embedding, tied": (edited("llama", without("embed_tokens"), tied=True), "model.embed_tokens.weight missing"),
    "tied, with another head": (
        edited("llama", with_random("lm_head.weight", 101, 32), tied=True),
        "lm_head.weight is another than model.embed_tokens.weight, to which config.json ties it",
    ),
    "a head too small": (
        edited("llama", with_random("lm_head.weight", 97, 32)),
        "lm_head.weight has the shape [97, 32] there, and [101, 32] in the model",
    ),
    "a vision tower": (
        edited("llama", with_random("vision_tower.weight", 3)),
        "the model has no place for vision_tower.weight (model.ignore_weights",
    ),
    "two heads": (
        edited("gpt-neox", with_random("lm_head.weight", 101, 32)),
        "lm_head.weight is one more lm_head.weight",
    ),
    "no expert": (
        edited("qwen3-moe", without(EXPERT)),
        "model.layers.1.mlp.experts.gate_up_proj has the shape [3, 32, 32] there, and [4, 32, 32] in the model",
    ),
    "half an expert": (
        edited("qwen3-moe", without(f"{EXPERT}.up_proj")),
        "model.layers.1.mlp.experts.gate_up_proj cannot be made of model.layers.1.mlp.experts.0.gate_proj.weight, ",
    ),
    "no bias of a router": (edited("deepseek-v3", without("e_score_correction")), "gate.e_score_correction_bias"),
    "pickled": (as_bin, "there is no model.safetensors, and no model.safetensors.index.json that names other files"),
    "a lost file": (with_index("a.safetensors", "b.safetensors", "c.safetensors"), "c.safetensors"),
    "a file elsewhere": (
        with_index("a.safetensors", "../b.safetensors"),
        "names '../b.safetensors', which is no file of",
    ),
    "quantised": (quantised, "its weights are quantised (quantization_config in config.json)"),
}
"""What writes a folder that does not hold its model, and what must be said of it."""


@pytest.mark.parametrize("folder", BROKEN)
def test_folders_that_do_not_hold_the_whole_model_are_refused_by_name(folder: str, tmp_path: Path) -> None:
    write, message = BROKEN[folder]
    write(tmp_path)
    with pytest.raises(ValueError, match=r"model\.name: .* cannot be loaded: ") as error:
        load_model(ModelConfig(name=str(tmp_path)), seed=0)
    assert message in str(error.value)


def loaded(folder: Path, *ignored: str) -> Tensors:
    return load_model(ModelConfig(name=str(folder), ignore_weights=list(ignored)), seed=0)[0].state_dict()


def assert_as_transformers_reads_it(folder: Path) -> None:
    state, expected = loaded(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_read_as_transformers_reads_it(architecture: str, tmp_path: Path) -> None:
    write_model(tmp_path, architecture)
    model, _ = load_model(ModelConfig(name=str(tmp_path)), seed=0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_as_transformers_reads_it(tmp_path)
    buffers = dict(theirs.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize(
    "write",
    [
        # Rotary angles, and the layers of multi-token prediction, which transformers itself leaves out.
        edited("llama", with_random("model.layers.0.self_attn.rotary_emb.inv_freq", 4)),
        edited("deepseek-v3", with_random("model.layers.61.eh_proj.weight", 3, 3)),
        edited("ernie4.5-moe", with_random("model.mtp_block.0.mlp.weight", 3, 3)),
        # A head beside the embedding that it is tied to, and equal; and a head alone.
        edited("llama", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}), tied=True),
        edited("llama", lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}), tied=True),
        edited("qwen3-moe", lambda t: t.update({name: x.bfloat16() for name, x in t.items()})),
        with_index("a.safetensors", "b.safetensors"),
    ],
    ids=["angles", "prediction of DeepSeek", "of Ernie", "equal head", "head alone", "bfloat16", "two files"],
)
def test_what_transformers_accepts_for_good_reason_is_accepted(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path)
    assert_as_transformers_reads_it(tmp_path)


def test_a_backbone_saved_alone_is_a_tied_model(tmp_path: Path) -> None:
    write_model(tmp_path, "qwen3", tied=True)
    Qwen3Model.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")  # without the prefix `model.`
    assert_as_transformers_reads_it(tmp_path)


def test_tensors_that_a_key_names_are_read_past(tmp_path: Path) -> None:
    edited("llama", with_random("vision_tower.blocks.0.weight", 3))(tmp_path / "vision")
    assert not any("vision" in name for name in loaded(tmp_path / "vision", "vision_tower.*"))
    edited("llama", with_random("lm_head.weight", 101, 32), tied=True)(tmp_path / "tied")
    state = loaded(tmp_path / "tied", "lm_head.weight")
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    with pytest.raises(ValueError, match=r"model\.norm\.weight missing"):
        loaded(tmp_path / "tied", "lm_head.weight", "model.norm.*")
