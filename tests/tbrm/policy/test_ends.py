"""Where responses end: at what the model, its tokenizer, its template and the recipe name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tbrm.chat import Chat
from tbrm.config.section import ConfigError
from tbrm.policy.ends import Ends, end_of_turn
from tbrm.policy.generation import generation_mode
from tbrm.policy.model import PolicyModel
from tbrm.policy.tiny import tiny_tokenizer
from tbrm.rollout import EmbeddedEngine, Sampling, embedded, make_requests
from tests.tbrm.conftest import chat_of, make_lm

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, as byte-level BPE without merges: a character may take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def chatml_tokenizer(eos: str | None) -> PreTrainedTokenizerFast:
    """Ids 256 to 258: <|endoftext|>, <|im_start|>, <|im_end|>."""
    tokenizer = bytes_tokenizer()
    tokenizer.add_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = CHATML
    tokenizer.eos_token = eos
    return tokenizer


def ends_of(tokenizer: PreTrainedTokenizerBase, generation_config: Any, **rollout: Any) -> Chat:
    lm = make_lm("llama", tied=True)
    lm.resize_token_embeddings(len(tokenizer))
    lm.generation_config.eos_token_id = generation_config
    return chat_of(lm, tokenizer, rollout=rollout, chat={"plain": tokenizer.chat_template is None})


@pytest.mark.parametrize(
    ("generation_config", "eos", "ids", "turn"),
    [
        (256, "<|im_end|>", (256, 258), 258),  # Qwen2.5 base
        ([256, 258], "<|im_end|>", (256, 258), 258),  # Llama 3: the first is not the end of a turn
        (256, "<|endoftext|>", (256, 258), 258),  # a template of one's own on a base model
        (None, None, (258,), 258),
    ],
)
def test_every_end_that_is_named_counts_and_text_is_ended_as_the_template_ends_a_turn(
    generation_config: Any, eos: str | None, ids: tuple[int, ...], turn: int
) -> None:
    chat = ends_of(chatml_tokenizer(eos), generation_config)
    assert (chat.ends.ids, chat.ends.turn) == (ids, turn)
    assert chat.encode_response("5", truncated=False) == [*chat.tokenizer("5").input_ids, 258]
    assert "'<|im_end|>' = 258 (" in chat.said


def test_without_a_template_text_is_ended_with_the_tokenizers_eos() -> None:
    tokenizer = chatml_tokenizer("<|endoftext|>")
    for template in (None, "{{ messages[0].content }}", "{{ raise_exception('no') }}"):
        tokenizer.chat_template = template
        assert end_of_turn(tokenizer) is None
        ends = ends_of(tokenizer, 258).ends
        assert (ends.ids, ends.turn) == ((258, 256), 256)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"rollout.stop_ids: none, and the model names no end-of-sequence token"):
        ends_of(tokenizer, None)
    assert ends_of(tokenizer, None, stop_ids=[7]).ends == Ends(tokenizer, (7,), 7)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("so <b>4</b> and more</b>", "so <b>4</b>"),
        ("a café, closed", "a café"),
        ("<|im_end|></b>", "<|im_end|>"),
        ("no </ b>", None),
        ("STOP", "STOP"),
        ("", None),
    ],
)
def test_a_response_ends_with_the_token_that_completes_a_stop_string(text: str, kept: str | None) -> None:
    tokenizer = chatml_tokenizer("<|im_end|>")
    ends = Ends(tokenizer, (258,), 258, ("</b>", "é", "STOP"))
    length = ends.length(tokenizer(text).input_ids)
    assert length == (None if kept is None else len(tokenizer(kept).input_ids))


@pytest.mark.slow
@pytest.mark.parametrize("looks", [1, 3])
@pytest.mark.parametrize("batch_size", [2, 64])
def test_the_engine_ends_responses_at_stop_strings_and_cuts_nothing_else(
    batch_size: int, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against responses of the same noise without stop strings; ends that are noticed late, as on a GPU."""
    monkeypatch.setitem(embedded.TOKENS_BETWEEN_LOOKS, "cpu", looks)
    policy = PolicyModel(make_lm("llama", tied=True), temperature=3.0)
    prompts, sampling = [[5, 6], [7], [8, 9, 10]], Sampling(max_new_tokens=30, temperature=3.0)

    def responses(**rollout: Any) -> list:
        engine = EmbeddedEngine(policy, chat_of(policy.lm, rollout=rollout), batch_size)
        return [r for rs in engine.generate(make_requests(prompts, 12, 2), sampling) for r in rs]

    strings = ["7a", "<|unknown|>", "}", "b", "HELLO"]
    decode = tiny_tokenizer().decode
    stopped = 0
    for whole, cut in zip(responses(), responses(stop_strings=strings), strict=True):
        assert whole.token_ids[: len(cut.token_ids)] == cut.token_ids
        assert whole.logprobs[: len(cut.token_ids)] == pytest.approx(cut.logprobs, abs=1e-5)
        ends_in_text = any(string in decode(cut.token_ids) for string in strings)
        assert not any(string in decode(cut.token_ids[:-1]) for string in strings)
        assert ends_in_text or (whole.token_ids, whole.truncated) == (cut.token_ids, cut.truncated)
        assert not (ends_in_text and cut.truncated)
        stopped += ends_in_text and len(cut.token_ids) < len(whole.token_ids)
    assert stopped > 5


def test_ids_without_text_are_not_drawn_when_barred_and_the_others_keep_their_odds() -> None:
    tokenizer = tiny_tokenizer()
    lm = make_lm("llama", tied=True)
    lm.resize_token_embeddings(len(tokenizer) + 60, mean_resizing=False)
    torch.nn.init.normal_(lm.get_input_embeddings().weight, std=0.3)
    policy = PolicyModel(lm, temperature=2.0)

    def first_tokens(barred: bool) -> tuple[torch.Tensor, torch.Tensor]:
        chat = chat_of(lm, rollout={"bar_unused_ids": barred})
        assert len(chat.barred) == (60 if barred else 0)
        [answers] = EmbeddedEngine(policy, chat, 2000).generate(
            make_requests([[5, 6]], 2000), Sampling(1, temperature=2.0)
        )
        return torch.tensor([r.token_ids[0] for r in answers]), torch.tensor([r.logprobs[0] for r in answers])

    free, free_logprobs = first_tokens(False)
    barred, barred_logprobs = first_tokens(True)
    assert (free >= len(tokenizer)).any()
    assert not (barred >= len(tokenizer)).any()
    # What was drawn has the odds that it had, over the mass of what may be drawn.
    with torch.no_grad(), generation_mode(policy) as model:
        full = (model(input_ids=torch.tensor([[5, 6]])).logits[0, -1] / 2.0).log_softmax(-1)
    allowed = full[: len(tokenizer)].logsumexp(0)
    torch.testing.assert_close(free_logprobs, full[free], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(barred_logprobs, full[barred] - allowed, rtol=1e-4, atol=1e-4)


def test_stop_settings_that_say_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rollout.stop_strings"):
        chat_of(make_lm("llama", tied=True), rollout={"stop_strings": [""]})
    with pytest.raises(ConfigError, match=r"rollout.stop_ids"):
        chat_of(make_lm("llama", tied=True), rollout={"stop_ids": [-1]})
