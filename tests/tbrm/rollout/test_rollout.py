from __future__ import annotations

from collections.abc import Collection

import pytest
import torch

from tbrm.config.rollout import RolloutConfig
from tbrm.experience.collect import RolloutSource
from tbrm.policy.generation import generation_mode
from tbrm.policy.model import PolicyModel
from tbrm.policy.tiny import tiny_model, tiny_tokenizer
from tbrm.reporting.metrics import Phases
from tbrm.rollout import EmbeddedEngine, Sampling, embedded, make_requests
from tbrm.rollout.choose import draw
from tbrm.rollout.packed_weights import packed_weights
from tbrm.tasks import Grade, Problem, ProblemStream, Task
from tbrm.trajectories.packing import pack
from tbrm.trajectories.trajectory import Trajectory
from tests.tbrm.conftest import ARCHITECTURES, DENSE, VOCABULARY, chat_of, make_lm

PROMPTS = [[5], [5, 6, 7], [8, 9, 10, 11, 12], [5, 6]]


def engine_of(policy: PolicyModel, batch_size: int = 64) -> EmbeddedEngine:
    return EmbeddedEngine(policy, chat_of(policy.lm), batch_size)


def count_tokens(policy: PolicyModel) -> list[int]:
    """The tokens of each pass of the model from now on."""
    tokens: list[int] = []
    policy.lm.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return tokens


@torch.no_grad()
def greedy_by_hand(policy: PolicyModel, prompt: list[int], eos_ids: Collection[int], steps: int) -> list[int]:
    """One prompt, no batch, no padding, no cache."""
    with generation_mode(policy) as lm:
        ids = list(prompt)
        while len(ids) < len(prompt) + steps:
            ids.append(int(lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] in eos_ids:
                break
    return ids[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("system", [[], [20, 21, 22, 23, 24, 25]], ids=["", "system prompt"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_responses_are_the_models_own(architecture: str, system: list[int], samples: int) -> None:
    """Padding, what prompts share, its cache and the cache's repetition must not change a single token."""
    policy = PolicyModel(make_lm(architecture, tied=True))
    engine = engine_of(policy)
    prompts = [system + prompt for prompt in PROMPTS]
    answers = engine.generate(make_requests(prompts, samples), Sampling(max_new_tokens=8, temperature=0))
    for prompt, responses in zip(prompts, answers, strict=True):
        expected = greedy_by_hand(policy, prompt, engine.ends.ids, 8)
        assert [r.token_ids for r in responses] == [expected] * samples
        assert responses[0].truncated == (expected[-1] not in engine.ends.ids)


@pytest.mark.parametrize(("samples", "expected"), [(1, [4, 0 + 1 + 2, 3]), (2, [4, 0 + 1 + 2, 6])])
def test_what_prompts_share_is_read_once(samples: int, expected: list[int]) -> None:
    """Tokens of each pass before the first new token: the beginning, the rest but the last ones, and these of every row."""
    policy = PolicyModel(make_lm("llama", tied=True))
    tokens = count_tokens(policy)
    prompts = [[5, 6, 7, 8, 9], [5, 6, 7, 8, 10, 11, 12], [5, 6, 7, 8, 13, 14]]
    engine_of(policy).generate(make_requests(prompts, samples), Sampling(max_new_tokens=1, temperature=0))
    assert tokens == expected


@pytest.mark.parametrize("samples", [1, 2])
def test_equal_prompts_share_all_but_their_last_token(samples: int) -> None:
    policy = PolicyModel(make_lm("llama", tied=True))
    engine = engine_of(policy)
    expected = greedy_by_hand(policy, [5, 6, 7], engine.ends.ids, 6)
    for responses in engine.generate(
        make_requests([[5, 6, 7]] * 3, samples), Sampling(max_new_tokens=6, temperature=0)
    ):
        assert [r.token_ids for r in responses] == [expected] * samples


MIXED = [[5], list(range(3, 43)), [9, 8, 7], [9, 8, 7], [5, 6], [5, 6, 7, 8, 9, 10, 11], [5], [50, 51, 52], [5, 6, 8]]


@pytest.mark.slow
@pytest.mark.parametrize("looks", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("architecture", DENSE)
def test_rows_come_and_go_without_a_trace(
    architecture: str, batch_size: int, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Responses of many lengths, long and short prompts, equal ones, more of them than rows; and ends that are noticed late,
    as on a GPU."""
    monkeypatch.setitem(embedded.TOKENS_BETWEEN_LOOKS, "cpu", looks)
    monkeypatch.setattr(embedded, "PROMPT_TOKENS", 12)
    lm = make_lm(architecture, tied=False)
    lm.generation_config.eos_token_id = list(range(2, 15))
    policy = PolicyModel(lm)
    engine = engine_of(policy, batch_size)
    tokens = count_tokens(policy)
    answers = engine.generate(make_requests(MIXED, 2), Sampling(max_new_tokens=16, temperature=0))
    assert max(tokens) <= batch_size + max(12, len(MIXED[1]) - 1)
    expected = {tuple(prompt): greedy_by_hand(policy, prompt, engine.ends.ids, 16) for prompt in MIXED}
    assert len(set(map(len, expected.values()))) > 3
    for prompt, responses in zip(MIXED, answers, strict=True):
        assert [r.token_ids for r in responses] == [expected[tuple(prompt)]] * 2


@pytest.mark.parametrize("samples", [1, 4])
def test_rows_are_kept_full_and_no_longer_than_needed(samples: int) -> None:
    policy = PolicyModel(make_lm("llama", tied=True))
    tokens = count_tokens(policy)
    answers = engine_of(policy, batch_size=4).generate(make_requests(MIXED, samples, 1), Sampling(max_new_tokens=12))
    lengths = [len(r.token_ids) for responses in answers for r in responses]
    assert len(set(lengths)) > 1
    read_once = sum(len(prompt) - 1 for prompt in MIXED)
    assert sum(tokens) <= sum(lengths) + read_once
    assert len(tokens) <= sum(lengths) / 4 + 12 + len(MIXED)


def test_samples_do_not_depend_on_the_other_rows() -> None:
    policy = PolicyModel(make_lm("gemma3", tied=True))
    sampling = Sampling(max_new_tokens=12, temperature=3.0)
    together = engine_of(policy).generate(make_requests(MIXED, 3), sampling)
    assert len({tuple(r.token_ids) for responses in together[2:4] for r in responses}) == 6  # equal prompts, own noise
    for batch_size, samples in ((1, 3), (5, 3), (5, 2)):
        apart = engine_of(policy, batch_size).generate(make_requests(MIXED, samples), sampling)
        for ours, theirs in zip(apart, together, strict=True):
            assert [r.token_ids for r in ours] == [r.token_ids for r in theirs[:samples]]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_responses_carry_the_log_probs_of_the_policy(architecture: str) -> None:
    policy = PolicyModel(make_lm(architecture, tied=True), temperature=0.7)
    answers = engine_of(policy, batch_size=5).generate(
        make_requests(MIXED, 2), Sampling(max_new_tokens=12, temperature=0.7)
    )
    pairs = [(prompt, r) for prompt, responses in zip(MIXED, answers, strict=True) for r in responses]
    with torch.no_grad():
        expected = policy(pack([Trajectory(prompt, r.token_ids, 0.0) for prompt, r in pairs])).logprobs
    ours = torch.tensor([x for _, r in pairs for x in r.logprobs or []])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert engine_of(policy).generate(make_requests(MIXED, 1), Sampling(4, temperature=0))[0][0].logprobs is None


def test_bfloat16_is_the_models_own() -> None:
    policy = PolicyModel(make_lm("llama", tied=True), precision=torch.bfloat16)
    [[response]] = engine_of(policy).generate(make_requests([[5, 6, 7]], 1, 3), Sampling(max_new_tokens=12))
    ids = [5, 6, 7, *response.token_ids]
    with torch.no_grad(), generation_mode(policy) as lm:
        logits = lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0, 2:-1].float()
    expected = logits.log_softmax(-1).gather(1, torch.tensor(response.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(response.logprobs), expected, rtol=0, atol=0.1)


def test_the_policy_is_left_as_it_was() -> None:
    policy = PolicyModel(make_lm("qwen2", tied=True))  # with biases
    before = [(name, type(module)) for name, module in policy.named_modules()]
    plain = greedy_by_hand(policy, [5, 6, 7], [2], 8)
    with pytest.raises(RuntimeError, match="broken"), packed_weights(policy.lm, policy.precision):
        assert not any(type(module) is torch.nn.Linear for module in policy.modules())
        assert greedy_by_hand(policy, [5, 6, 7], [2], 8) == plain
        raise RuntimeError("broken")
    assert [(name, type(module)) for name, module in policy.named_modules()] == before
    engine = engine_of(policy)
    old = engine.generate(make_requests([[5, 6, 7]], 1), Sampling(8, temperature=0))
    with torch.no_grad():
        policy.lm.get_output_embeddings().weight.mul_(-1.0)
    assert (
        engine.generate(make_requests([[5, 6, 7]], 1), Sampling(8, temperature=0)) != old
    )  # nothing kept of old weights


@pytest.mark.parametrize("vocabulary", [1, 97, 128, 1000])
def test_a_uniform_number_chooses_by_the_cumulative_distribution(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, vocabulary, generator=generator) * 4
    logits[:, 3::7] = float("-inf")
    uniforms = torch.rand(300, generator=generator, dtype=torch.float64)
    uniforms[:2] = torch.tensor([0.0, 1 - 2**-53])
    probabilities = (logits.double() / 0.7).softmax(-1)
    cumulative = probabilities.cumsum(-1)
    tokens, logprobs = draw(logits.clone(), 0.7, uniforms)
    chosen = tokens[:, None]
    assert (probabilities.gather(1, chosen) > 0).all()
    torch.testing.assert_close(logprobs.double(), probabilities.gather(1, chosen)[:, 0].log(), rtol=1e-5, atol=1e-5)
    above = cumulative.gather(1, chosen)[:, 0] - uniforms
    assert (above > -1e-6).all()
    assert (above - probabilities.gather(1, chosen)[:, 0] < 1e-6).all()


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_that_are_not_numbers_give_ids_of_the_vocabulary_and_log_probs_that_tell(broken: float) -> None:
    logits = torch.zeros(2, 101)
    logits[0, 50] = broken
    tokens, logprobs = draw(logits, 1.0, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert 0 <= tokens[0] < 101
    assert logprobs.isnan().tolist() == [True, False]


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_model_whose_logits_are_not_numbers_is_named(temperature: float) -> None:
    lm = make_lm("llama", tied=True)
    with torch.no_grad():
        lm.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"the model's logits are NaN or infinite.*overflow in torch.float32"):
        engine_of(PolicyModel(lm)).generate(make_requests([[5, 6]], 2), Sampling(4, temperature=temperature))


def test_every_eos_id_ends_a_response() -> None:
    lm = make_lm("llama", tied=True)
    lm.generation_config.eos_token_id = list(range(3, 40))
    engine = engine_of(PolicyModel(lm))
    responses = [r for rs in engine.generate(make_requests(PROMPTS, 16, 1), Sampling(max_new_tokens=12)) for r in rs]
    assert len({r.token_ids[-1] for r in responses if not r.truncated}) > 3
    for r in responses:
        assert not any(token in engine.ends.ids for token in r.token_ids[:-1])
        assert r.truncated == (r.token_ids[-1] not in engine.ends.ids)
        assert len(r.token_ids) == 12 or not r.truncated


def test_sampling_is_seeded_and_leaves_the_global_state_alone() -> None:
    engine = engine_of(PolicyModel(make_lm("llama", tied=True)), batch_size=6)
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    first = engine.generate(make_requests(PROMPTS, 4, 5), Sampling(max_new_tokens=6))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(999)
    assert engine.generate(make_requests(PROMPTS, 4, 5), Sampling(max_new_tokens=6)) == first
    assert engine.generate(make_requests(PROMPTS, 4, 6), Sampling(max_new_tokens=6)) != first
    assert len({tuple(r.token_ids) for r in first[0]}) > 1  # samples of one prompt differ


def test_the_models_generation_defaults_do_not_bias_sampling() -> None:
    """Hub models ship top_k, top_p and a repetition penalty; log-probs in training know nothing of them."""
    lm = make_lm("llama", tied=True)
    plain = engine_of(PolicyModel(lm)).generate(make_requests(PROMPTS, 4, 5), Sampling(max_new_tokens=6))
    lm.generation_config.update(top_k=1, top_p=0.1, repetition_penalty=3.0, min_new_tokens=5)
    assert engine_of(PolicyModel(lm)).generate(make_requests(PROMPTS, 4, 5), Sampling(max_new_tokens=6)) == plain
    assert lm.generation_config.top_k == 1  # and they are still there to be saved


def test_samples_follow_the_policys_own_probabilities() -> None:
    policy = PolicyModel(make_lm("llama", tied=True), temperature=2.0)
    n = 4000
    [responses] = engine_of(policy, batch_size=n).generate(
        make_requests([[5, 6]], n), Sampling(max_new_tokens=1, temperature=2.0)
    )
    with torch.no_grad(), generation_mode(policy) as lm:
        expected = (lm(input_ids=torch.tensor([[5, 6]])).logits[0, -1] / 2.0).softmax(-1)
    counts = torch.bincount(torch.tensor([r.token_ids[0] for r in responses]), minlength=VOCABULARY)
    # Pearson's chi-square over 97 outcomes, those that are too rare for it together in one.
    frequent = expected * n >= 5
    observed = torch.cat([counts[frequent], counts[~frequent].sum()[None]])
    wanted = n * torch.cat([expected[frequent], expected[~frequent].sum()[None]])
    chi_square = ((observed - wanted).square() / wanted).sum()
    assert chi_square < len(wanted) + 5 * (2 * len(wanted)) ** 0.5


class Echo(Task):
    """Rewards the length of the response's text; fails to grade those that start with a space."""

    name: str = "echo"

    def problem(self, index: int, seed: int) -> Problem:
        return Problem(f"{index % 7}", answer="")

    def heldout(self, count: int) -> list[Problem]:
        return [Problem(f"{i}", answer="") for i in range(count)]

    def grade(self, problems, responses) -> list[Grade]:
        return [Grade(float(len(r)), False, "space" if r.startswith(" ") else None) for r in responses]


def collect(**config) -> tuple[RolloutSource, list]:
    policy = PolicyModel(tiny_model(len(tiny_tokenizer()), seed=0))
    task = Echo()
    stream = ProblemStream(task, 0, task.heldout(3))
    rollout = RolloutConfig(prompts=5, samples=8, max_new_tokens=40, **config)
    chat = chat_of(policy.lm)
    source = RolloutSource(stream, EmbeddedEngine(policy, chat, 64), chat, rollout, seed=0)
    return source, [source.collect(step, Phases(torch.device("cpu"))) for step in (1, 2)]


def test_collected_trajectories_carry_what_training_needs() -> None:
    source, steps = collect()
    first = steps[0].trajectories
    assert len(first) == 40
    assert {t.group for t in first}.isdisjoint({t.group for t in steps[1].trajectories})
    assert [t.weight_version for t in first] == [0] * 40
    assert [t.weight_version for t in steps[1].trajectories] == [1] * 40
    assert any(t.truncated for t in first)
    assert not all(t.truncated for t in first)
    assert steps[0].metrics["dropped"] == 0
    held_out = {problem.prompt for problem in source.stream.task.heldout(3)}
    assert held_out.isdisjoint({problem.prompt for step in steps for problem in step.problems})


def test_truncated_responses_get_what_the_recipe_says() -> None:
    by_verifier = collect()[1][0].trajectories
    fixed = collect(truncated="fixed", truncated_reward=-1.0)[1][0].trajectories
    for own, replaced in zip(by_verifier, fixed, strict=True):
        assert own.response_ids == replaced.response_ids
        assert replaced.reward == (-1.0 if own.truncated else own.reward)
    dropped = collect(truncated="drop")[1][0]
    assert [t.response_ids for t in dropped.trajectories] == [t.response_ids for t in by_verifier if not t.truncated]
    assert dropped.metrics["dropped"] == sum(t.truncated for t in by_verifier)
