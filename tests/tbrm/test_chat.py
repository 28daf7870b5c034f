from __future__ import annotations

import string

import torch

from tbrm.chat import decode, encode_messages, encode_problems
from tbrm.tasks import Problem
from tbrm.tiny import tiny_model, tiny_tokenizer

CHAT = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 3"})


def test_a_problem_is_encoded_by_the_models_own_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    plain, chat = encode_problems(tokenizer, [Problem("2 + 3", "5"), Problem(CHAT, "5")])
    assert tokenizer.decode(plain) == "<|user|>2 + 3<|end|><|assistant|>"
    assert tokenizer.decode(chat) == "<|system|>Be brief.<|end|><|user|>2 + 3<|end|><|assistant|>"


def test_a_model_without_a_template_gets_the_plain_text() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    assert tokenizer.decode(encode_messages(tokenizer, CHAT)) == "Be brief.\n\n2 + 3"


def test_the_tiny_tokenizer_has_a_token_for_every_printable_character() -> None:
    tokenizer = tiny_tokenizer()
    text = string.printable[:95] + "\n"
    ids = tokenizer(text).input_ids
    assert len(set(ids)) == len(text)
    assert tokenizer.unk_token_id not in ids
    assert decode(tokenizer, [*ids, tokenizer.eos_token_id]) == text
    assert tokenizer("é").input_ids == [tokenizer.unk_token_id]


def test_the_tiny_model_depends_on_its_seed_alone() -> None:
    torch.manual_seed(1)
    one = tiny_model(50, seed=3).state_dict()
    torch.manual_seed(2)
    again, other = tiny_model(50, seed=3).state_dict(), tiny_model(50, seed=4).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
