from __future__ import annotations

import copy
import string
from datetime import date
from pathlib import Path

import pytest
import torch

import tbrm.trainer
from tbrm.chat import decode, encode_messages, encode_problems, set_day
from tbrm.tasks import Problem
from tbrm.tiny import tiny_model, tiny_tokenizer
from tbrm.trainer import Trainer
from tests.tbrm.conftest import tiny_config

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


DATED = (  # Llama 3.2's way
    "{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "Today is {{ date_string }}.{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
)


def test_a_template_that_names_the_day_names_the_one_that_was_set() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = DATED
    assert date.today().strftime("%d %b %Y") in tokenizer.decode(encode_messages(tokenizer, CHAT))
    set_day(tokenizer, date(2024, 7, 26))
    for carrier in (tokenizer, copy.deepcopy(tokenizer)):  # rollouts beside training have a copy
        assert tokenizer.decode(encode_messages(carrier, CHAT)).startswith("Today is 26 Jul 2024.<|system|>")


def test_a_run_keeps_its_day_past_midnight_and_past_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = DATED
    tiny_model(len(tokenizer), seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = tiny_config(
        tmp_path / "run",
        model__name=str(tmp_path / "model"),
        trainer__steps=2,
        checkpoint__every=1,
        evaluation={"prompts": 0},
    )

    def prompt_of_a_step_on(day: date, *, resume: bool) -> str:
        class Clock(date):
            @classmethod
            def today(cls) -> date:
                return day

        monkeypatch.setattr(tbrm.trainer, "date", Clock)
        trainer = Trainer(config, resume=resume)
        collected = trainer.supply.collect(trainer.state.step + 1, trainer.phases)
        if not resume:
            trainer.supply.waiting.append(collected)
            trainer.train()
        return trainer.tokenizer.decode(collected.trajectories[0].prompt_ids)

    assert prompt_of_a_step_on(date(2026, 1, 31), resume=False).startswith("Today is 31 Jan 2026.")
    assert prompt_of_a_step_on(date(2026, 2, 1), resume=True).startswith("Today is 31 Jan 2026.")


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
