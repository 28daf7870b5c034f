from __future__ import annotations

import copy
import json
import string
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import tbrm.training.trainer
from tbrm.chat import Chat
from tbrm.commands.score import score_file
from tbrm.config.recipe import parse_config
from tbrm.config.section import ConfigError
from tbrm.experience.record import record
from tbrm.policy.load import set_day
from tbrm.policy.tiny import tiny_model, tiny_tokenizer
from tbrm.tasks import Problem
from tbrm.training.trainer import Trainer
from tests.tbrm.conftest import chat_of, tiny_config, tiny_tree

SYSTEM = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 3"})
TOOL_TEMPLATE = (  # renders calls as Qwen's does, and drops neither names nor ids
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ 'user' if m.role == 'tool' else m.role }}|>{{ m.name or '' }}{{ m.tool_call_id or '' }}"
    "{{ m.content }}{% for c in (m.tool_calls or []) %}[call {{ c.function.name }}({{ c.function.arguments }})]{% endfor %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ZEPHYR = (  # knows users and assistants only
    "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}<|{{ m.role }}|>{{ m.content.strip() }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
TOOLS = ({"type": "function", "function": {"name": "weather", "parameters": {}}},)
WEATHER = (
    {"role": "user", "content": "Weather in Paris?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "name": "weather", "content": "14 C"},
)

NAMED = ({"role": "user", "content": "2 + 3", "name": "Ann"},)


def tokenizer_with(template: str | None, *special: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.add_tokens(list(special), special_tokens=True)
    return tokenizer


def chat_with(tokenizer: PreTrainedTokenizerFast | None = None, rows: int = 0, **sections: Any) -> Chat:
    tokenizer = tokenizer or tiny_tokenizer()
    return chat_of(tiny_model(rows or len(tokenizer), seed=0), tokenizer, **sections)


def shown(chat: Chat, *arguments: Any) -> str:
    return str(chat.tokenizer.decode(chat.encode(*arguments)))


def test_a_problem_is_encoded_by_the_models_own_chat_template() -> None:
    chat = chat_with()
    _, [plain, system] = chat.encode_problems([Problem("2 + 3", "5"), Problem(SYSTEM, "5")])
    assert chat.tokenizer.decode(plain) == "<|user|>2 + 3<|end|><|assistant|>"
    assert chat.tokenizer.decode(system) == "<|system|>Be brief.<|end|><|user|>2 + 3<|end|><|assistant|>"


@pytest.mark.parametrize("template", [None, tiny_tokenizer().chat_template])
def test_plain_text_is_a_choice(template: str | None) -> None:
    tokenizer = tokenizer_with(template)
    assert shown(chat_with(tokenizer, chat={"plain": True}), SYSTEM) == "Be brief.\n\n2 + 3"
    assert tokenizer.chat_template == template  # which a checkpoint goes on with


def test_a_model_without_a_template_wants_one_or_plain_text_chosen() -> None:
    with pytest.raises(
        ConfigError, match=r"chat: the model has no chat template: set chat.plain=true .* chat.template to"
    ):
        chat_with(tokenizer_with(None))


def test_a_template_may_be_given_as_text_or_file_and_stays_with_the_tokenizer(tmp_path: Path) -> None:
    template = "{% for message in messages %}Q: {{ message['content'] }}\n{% endfor %}A:"
    (tmp_path / "mine.jinja").write_text(template)
    for given in (template, str(tmp_path / "mine.jinja")):
        chat = chat_with(tokenizer_with(None), chat={"template": given})
        assert shown(chat, SYSTEM[1:]) == "Q: 2 + 3\nA:"
        assert chat.tokenizer.chat_template == template


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{% for x in %}", r"chat.template: line 1: .*; wants a Jinja template"),
        ("no/such.jinja", r"chat.template: 'no/such.jinja' is neither a template's text nor a file of one"),
        ("$NOWHERE/x.jinja", r"chat.template: .* names the environment variable 'NOWHERE', which is not set"),
    ],
)
def test_what_is_no_template_is_refused(given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chat_with(chat={"template": given})


@pytest.mark.parametrize("other", [{"template": "{{ messages }}"}, {"template_kwargs": {"enable_thinking": False}}])
def test_plain_text_takes_no_template(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"plain: true, and {next(iter(other))} is given"):
        chat_with(chat={"plain": True, **other})


def test_a_last_message_of_the_assistant_is_continued() -> None:
    begun = (*SYSTEM, {"role": "assistant", "content": "It is "})
    assert shown(chat_with(), begun) == "<|system|>Be brief.<|end|><|user|>2 + 3<|end|><|assistant|>It is "


def test_calls_names_and_tools_reach_the_template() -> None:
    text = shown(chat_with(tokenizer_with(TOOL_TEMPLATE)), WEATHER, TOOLS)
    assert text.startswith(f"<|system|>{json.dumps(list(TOOLS))}<|end|>")
    assert '[call weather({"city": "Paris"})]' in text
    assert text.endswith("<|user|>weather114 C<|end|><|assistant|>")


@pytest.mark.parametrize(
    ("template", "messages", "tools", "message"),
    [
        (tiny_tokenizer().chat_template, WEATHER, (), "tool_calls: a message has some, and .* does not show it"),
        (tiny_tokenizer().chat_template, SYSTEM, TOOLS, "tools: given, and .* does not show it"),
        (tiny_tokenizer().chat_template, NAMED, (), "name: a message of user has 'Ann', and .* does not show it"),
        (None, SYSTEM, TOOLS, "tools: given, and plain text cannot show it"),
        (None, WEATHER, (), "tool_calls: a message has some, and plain text cannot show it"),
        (
            ZEPHYR,
            SYSTEM,
            (),
            r"messages: one of system \(task.system\) says 'Be brief.', and .* does not show it; leave",
        ),
        (ZEPHYR, (*SYSTEM[1:], WEATHER[2]), (), "messages: one of tool says '14 C', and .* does not show it"),
        (TOOL_TEMPLATE, WEATHER[:2], (), "it ends with a call of a tool, which cannot be continued"),
        ("{{ raise_exception('no system role') }}", SYSTEM, (), "refuses messages of system, user: no system role"),
    ],
)
def test_what_the_template_would_not_show_is_refused(template: Any, messages: Any, tools: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chat_with(tokenizer_with(template), chat={"plain": template is None}).encode(messages, tools)


def test_ids_names_of_tools_that_answer_and_earlier_reasoning_may_go_unshown() -> None:
    """As Qwen's template leaves them out."""
    answered = {"role": "assistant", "content": "5", "reasoning_content": "Two and three."}
    prompt = ({**SYSTEM[1], "id": 7, "name": ""}, answered, {"role": "system", "content": " "}, WEATHER[2])
    text = "<|user|>2 + 3<|end|><|assistant|>5<|end|><|system|> <|end|><|tool|>14 C<|end|><|assistant|>"
    assert shown(chat_with(), prompt) == text


def test_what_a_template_shows_is_looked_at_once_for_prompts_of_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = chat_with(tokenizer_with(TOOL_TEMPLATE))
    rendered: list[Any] = []
    render = chat.tokenizer.apply_chat_template
    monkeypatch.setattr(chat.tokenizer, "apply_chat_template", lambda m, **k: (rendered.append(m), render(m, **k))[1])
    chat.encode_problems([Problem(str(n), "") for n in range(10)])
    assert len(rendered) == 10 + 1
    chat.encode(NAMED)
    assert len(rendered) == 11 + 3


THINKING = tiny_tokenizer().chat_template + "{% if not enable_thinking | default(true) %}[thought]{% endif %}"


def test_arguments_reach_the_template_and_unknown_ones_are_named() -> None:
    tokenizer = tokenizer_with(THINKING)
    assert shown(chat_with(tokenizer), SYSTEM[1:]).endswith("<|assistant|>")
    chat = chat_with(tokenizer, chat={"template_kwargs": {"enable_thinking": False}})
    assert shown(chat, SYSTEM[1:]).endswith("<|assistant|>[thought]")
    for name in ("add_generation_prompt", "messages", "tools", "conversation", "tokenize", "documents"):
        with pytest.raises(ConfigError, match=rf"chat.template_kwargs.{name}: not the recipe's to set; leave it out"):
            chat_with(tokenizer, chat={"template_kwargs": {name: []}})
    with pytest.raises(ConfigError, match=r"chat.template_kwargs.thinking: the model's chat template has no such name"):
        chat_with(tokenizer, chat={"template_kwargs": {"thinking": False}})


def test_the_text_of_a_response_has_its_special_tokens_but_for_the_end() -> None:
    chat = chat_with(tokenizer_with(tiny_tokenizer().chat_template, "<answer>", "</answer>"))
    ids = chat.encode_response("<answer>5</answer>", truncated=False)
    assert len(ids) == 4
    assert chat.decode(ids) == chat.decode(ids[:-1]) == "<answer>5</answer>"


def test_the_text_of_a_response_keeps_its_white_space_whatever_the_tokenizer_would_tidy() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    chat = chat_with(tokenizer)
    assert chat.decode(chat.encode_response("[ 1 , 2 ] do n't !", truncated=False)) == "[ 1 , 2 ] do n't !"


def test_text_that_has_its_end_gets_no_other() -> None:
    chat = chat_with(rollout={"stop_strings": ["</answer>"]})
    for text, end in (("4", "<|end|>"), ("4<|end|>", ""), ("4</answer>", ""), ("</answer>4", "<|end|>")):
        assert chat.tokenizer.decode(chat.encode_response(text, truncated=False)) == text + end


def test_prompts_that_are_too_long_are_refused_or_left_out() -> None:
    problems = [Problem("1", ""), Problem("1" * 40, ""), Problem("2", "")]
    with pytest.raises(ValueError, match=r"rollout.max_prompt_tokens: 20, and a prompt has 43 tokens: '1111"):
        chat_with(rollout={"max_prompt_tokens": 20}).encode_problems(problems)
    kept, prompts = chat_with(rollout={"max_prompt_tokens": 20, "long_prompts": "drop"}).encode_problems(problems)
    assert kept == problems[::2]
    assert [len(ids) for ids in prompts] == [4, 4]


def test_a_token_that_the_model_has_no_embedding_for_is_named() -> None:
    chat = chat_with(tokenizer_with(tiny_tokenizer().chat_template, "<answer>"), rows=101)
    with pytest.raises(ValueError, match="the prompt holds token id 101, and the model has embeddings for 0 to 100"):
        chat.encode(({"role": "user", "content": "<answer>"},))
    with pytest.raises(ValueError, match=r"rollout.stop_ids holds token id 200"):
        chat_with(rollout={"stop_ids": [200]})


def test_a_template_that_refuses_a_role_is_named_before_anything_is_generated(tmp_path: Path) -> None:
    """As Gemma's refuses a system prompt."""
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer = tokenizer_with(refuses + str(tiny_tokenizer().chat_template))
    tiny_model(len(tokenizer), seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tree = tiny_tree(tmp_path / "run", model__name=str(tmp_path / "model"), task__system="Be brief.")
    with pytest.raises(
        ValueError, match=r"refuses messages of system, user: System role not supported\. .*task\.system"
    ):
        Trainer(parse_config(tree))


def tagged(prompts: Any, completions: list[str], **_: Any) -> list[float]:
    return [float("<answer>" in completion) for completion in completions]


@pytest.mark.parametrize("barred", [False, True])
def test_a_padded_vocabulary_is_trained_recorded_read_back_and_scored(
    tmp_path: Path, barred: bool, capsys: pytest.CaptureFixture
) -> None:
    """Of a model whose tokenizer has tags, and fewer tokens than the model has embeddings; the reward asks for a tag."""
    tokenizer = tokenizer_with(tiny_tokenizer().chat_template, "<answer>", "</answer>")
    rows = len(tokenizer) + 17
    tiny_model(rows, seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    problems = [{"prompt": "1" * (1 + i % 30), "answer": "1"} for i in range(60)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    task = {"name": "file", "path": str(tmp_path / "problems.jsonl"), "verifier": f"{__name__}:tagged"}
    task["heldout_rows"] = 6  # whose prompts are all too long
    tree = tiny_tree(tmp_path / "run", model__name=str(tmp_path / "model"), task=task, evaluation={"prompts": 4})
    limits = {"max_prompt_tokens": 20, "long_prompts": "drop"}
    tree["rollout"].update(prompts=16, samples=8, max_new_tokens=12, bar_unused_ids=barred, **limits)
    config = parse_config(tree)

    trainer = Trainer(config)
    said = capsys.readouterr().err
    assert "responses end at '<|end|>' = 0 (generation_config, tokenizer, chat template)" in said
    assert "task: 6 of 54 training rows of " in said
    assert "evaluation: 4 of 4 problems left out, by rollout.max_prompt_tokens" in said
    metrics = trainer.train_step()
    assert metrics["correct_share"] > 0  # a reward function sees the tag
    assert metrics["prompts_dropped"] > 0

    recorded = tmp_path / "recorded.jsonl"
    record(config, recorded, steps=1)
    read = [json.loads(line) for line in recorded.read_text().splitlines()]
    drawn = {token for row in read for token in row["response_ids"]}
    assert any(token >= len(tokenizer) for token in drawn) is not barred
    again = Trainer(
        parse_config({**tree, "run": {"dir": str(tmp_path / "again")}, "data": {"trajectories": str(recorded)}})
    )
    ids = [(t.prompt_ids, t.response_ids) for t in again.supply.source.trajectories]  # type: ignore[union-attr]
    assert ids == [(row["prompt_ids"], row["response_ids"]) for row in read]
    assert again.train_step()["loss"] > 0
    assert len(list(score_file(again.policy, again.chat, recorded, batch_tokens=500))) == len(read)


DATED = (  # Llama 3.2's way
    "{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "Today is {{ date_string }}.{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
)


def test_a_template_that_names_the_day_names_the_one_that_was_set() -> None:
    chat = chat_with(tokenizer_with(DATED))
    assert date.today().strftime("%d %b %Y") in shown(chat, SYSTEM)
    set_day(chat.tokenizer, date(2024, 7, 26))
    for carrier in (chat, copy.deepcopy(chat)):  # rollouts beside training have a copy
        assert shown(carrier, SYSTEM).startswith("Today is 26 Jul 2024.<|system|>")


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

        monkeypatch.setattr(tbrm.training.trainer, "date", Clock)
        trainer = Trainer(config, resume=resume)
        collected = trainer.supply.collect(trainer.state.step + 1, trainer.phases)
        if not resume:
            trainer.supply.waiting.append(collected)
            trainer.train()
        return trainer.tokenizer.decode(collected.trajectories[0].prompt_ids)

    assert prompt_of_a_step_on(date(2026, 1, 31), resume=False).startswith("Today is 31 Jan 2026.")
    assert prompt_of_a_step_on(date(2026, 2, 1), resume=True).startswith("Today is 31 Jan 2026.")


def test_the_tiny_tokenizer_has_a_token_for_every_printable_character() -> None:
    chat = chat_with()
    text = string.printable[:95] + "\n"
    ids = chat.tokenizer(text).input_ids
    assert len(set(ids)) == len(text)
    assert chat.tokenizer.unk_token_id not in ids
    assert chat.decode([*ids, chat.tokenizer.eos_token_id]) == text
    assert chat.tokenizer("é").input_ids == [chat.tokenizer.unk_token_id]


def test_the_tiny_model_depends_on_its_seed_alone() -> None:
    torch.manual_seed(1)
    one = tiny_model(50, seed=3).state_dict()
    torch.manual_seed(2)
    again, other = tiny_model(50, seed=3).state_dict(), tiny_model(50, seed=4).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
