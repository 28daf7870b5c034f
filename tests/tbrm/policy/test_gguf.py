"""import-gguf on a small file written here with the gguf package, in the layout of llama.cpp's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tbrm.policy.gguf import import_gguf

gguf = pytest.importorskip("gguf")

TOKENS = ["<unk>", "<s>", "</s>", *"abcdefgh", "ab", "cd"]


def write_llama(path: Path, left_out: str = "lm_head.weight") -> LlamaForCausalLM:
    torch.manual_seed(0)
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(TOKENS), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, tie_word_embeddings=True, eos_token_id=2, bos_token_id=1, pad_token_id=2,
        )
    )  # fmt: skip
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "model.layers": "blk",
    }
    for name, tensor in lm.state_dict().items():
        if name in ("lm_head.weight", left_out):
            continue
        tensor = tensor.detach()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp interleaves the halves of the rotary embedding
            tensor = tensor.reshape(1, 2, 16, 32).swapaxes(1, 2).reshape(32, 32)
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return lm.eval()


def test_an_imported_model_is_a_plain_folder_with_the_same_weights(tmp_path: Path) -> None:
    lm = write_llama(tmp_path / "model.gguf")
    import_gguf(tmp_path / "model.gguf", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", use_safetensors=True)
    assert not hasattr(loaded.config, "quantization_config")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    tokens = torch.tensor([[3, 4, 5, 6]])
    torch.testing.assert_close(loaded(tokens).logits, lm(tokens).logits)
    assert loaded.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template is not None
    assert tokenizer.decode(tokenizer("abcd").input_ids, skip_special_tokens=True) == "abcd"


def test_a_file_without_one_of_its_tensors_is_refused(tmp_path: Path) -> None:
    write_llama(tmp_path / "model.gguf", left_out="model.layers.0.mlp.up_proj.weight")
    with pytest.raises(ValueError, match=r"is not the LlamaForCausalLM .*missing_keys.*layers\.0\.mlp\.up_proj"):
        import_gguf(tmp_path / "model.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no file; give the path of a .gguf file"):
        import_gguf(tmp_path / "none.gguf", tmp_path / "out")
    (tmp_path / "junk.gguf").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="cannot be read as GGUF"):
        import_gguf(tmp_path / "junk.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="exists already"):
        import_gguf(tmp_path / "junk.gguf", tmp_path)
