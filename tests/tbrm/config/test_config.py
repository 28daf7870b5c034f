from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tbrm.commands.cli import main
from tbrm.config.model import ModelConfig
from tbrm.config.recipe import config_to_dict, describe, load_config, load_sections, parse_config
from tbrm.config.section import ConfigError
from tbrm.policy.load import load_policy
from tests.tbrm.conftest import RECIPES, TINY, tiny_tree


@pytest.mark.parametrize("recipe", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_survives_being_saved(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe)
    saved = tmp_path / "config.yaml"
    saved.write_text(yaml.safe_dump(config_to_dict(config)))
    assert load_config(saved) == config


def test_overrides_replace_keys_of_any_section() -> None:
    overrides = [
        "optim.learning_rate=1e-5",
        "objective.beta=0.5",
        "task.params.max_digits=1",
        "seed=3",
        "logging.wandb=true",
    ]
    config = load_config(TINY, overrides)
    assert (config.optim.learning_rate, config.objective.beta, config.seed) == (1e-5, 0.5, 3)
    assert config.task.params["max_digits"] == 1
    assert config.logging.wandb is True


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optim.learning_rte=1e-5",
            r"optim.learning_rte: unknown key \(value 1e-05\); did you mean optim.learning_rate\?",
        ),
        ("trainer.learning_rate=1", r"trainer.learning_rate: unknown key .* did you mean optim.learning_rate\?"),
        ("objective.betta=1", r"objective.betta: unknown key .* did you mean objective.beta\?"),
        ("task.famly=chain_sum", r"task.famly: unknown key .* did you mean task.family\?"),
        (
            "objective.name=tbrn",
            r"objective.name: no objective is called 'tbrn': did you mean 'tbrm'\? Known: brm, given, grpo, optimal, ppo",
        ),
        ("objective.name=os:getcwd", r"objective.name: 'os:getcwd' is not a subclass of tbrm.objectives.Objective"),
        ("objective.name=nowhere:Thing", r"'nowhere:Thing' cannot be imported: No module named 'nowhere'"),
        ("trainer.steps=many", r"trainer.steps: got 'many' \(str\); wants: input should be a valid integer"),
        ("trainer.steps=2.5", r"trainer.steps: got 2.5 \(float\); wants: input should be a valid integer"),
        ("trainer.steps=true", r"trainer.steps: got True \(bool\)"),
        ("trainer.steps=0", r"trainer.steps: got 0 \(int\); wants: input should be greater than or equal to 1"),
        ("model.device=gpu", r"^model.device: got 'gpu'; wants auto, cpu, cuda or cuda:N$"),
        (
            "model.liger=true",
            r"model.liger: got True, and there is no such key any more: model.compile fuses norms and MLP",
        ),
        ("logging.wandb=1", r"logging.wandb: got 1 \(int\); wants: input should be a valid boolean"),
        (
            "rollout.truncated=maybe",
            r"rollout.truncated: got 'maybe' \(str\); wants: input should be 'reward', 'fixed' or 'drop'",
        ),
        ("task=null", r"neither task nor data.trajectories is set"),
        ("rollout.updates=3", r"rollout.prompts \(16\) is not a multiple of rollout.updates \(3\)"),
        ("replay.files=[a.jsonl]", r"replay.files is set but replay.samples_per_step is 0"),
        ("replay.samples_per_step=5", r"replay.samples_per_step is set but replay.capacity and"),
        ("evaluation.temperature=0", r"evaluation: samples is 16 but temperature is 0"),
        ("optim.warmup_steps=1000", r"optim.warmup_steps \(1000\) is above trainer.steps"),
        (
            "rollout.vllm.addresses=[127.0.0.1:8012]",
            r"vllm.addresses: '127.0.0.1:8012' is no address; wants http:// or",
        ),
        ("rollout.vllm.addresses=[localhost]", r"vllm.addresses: 'localhost' is no address; wants http:// or https://"),
        ("rollout.vllm.addresses=[http://:8012]", r"is no address; wants http:// or https://, a host"),
        ("rollout.vllm.addresses=['http://a:port']", r"'http://a:port' is no address"),
        ("rollout.vllm.addresses=['https://me:secret@a']", r"vllm.addresses: a: an address has neither a user"),
        ("rollout.vllm.addresses=['http://a:1', 'http://a:1/v1']", r"http://a:1 is there twice: name each server once"),
        (
            "rollout.vllm.headers_env={X Team: T}",
            r"headers_env: 'X Team' is no name of a header; wants letters, digits",
        ),
        ("rollout.vllm.headers_env={'X-Team\\n': T}", r"headers_env: .* is no name of a header"),
        ("rollout.vllm.headers_env={Content-Length: T}", r"headers_env: Content-Length is set by tbrm: leave it out"),
        (
            "rollout.vllm={addresses: ['http://a:1'], api_key_env: KEY, headers_env: {authorization: T}}",
            r"rollout.vllm: api_key_env is set, and Authorization in headers_env, too",
        ),
        ("rollout.vllm.api_key_env=KEY", r"rollout.vllm: api_key_env is set but addresses is not"),
        ("rollout.vllm={addresses: ['http://a:1'], devices: [0]}", r"rollout.vllm: devices is set, and addresses, too"),
        (
            "rollout.truncated_reward=.nan",
            r"rollout.truncated_reward: got nan \(float\); wants: input should be a finite",
        ),
        ("rollout.temperature=.inf", r"rollout.temperature: got inf \(float\); wants: input should be a finite number"),
        (
            "objective.reward_offset=-.inf",
            r"objective.reward_offset: got -inf .* wants: input should be a finite number",
        ),
        ("objective.beta=.inf", r"objective.beta: got inf \(float\); wants: input should be a finite number"),
        (
            "task.timeout_seconds=.inf",
            r"task.timeout_seconds: got inf \(float\); wants: input should be a finite number",
        ),
        ("optim.learning_rate=.inf", r"optim.learning_rate: got inf \(float\); wants: input should be a finite number"),
        ("optim.betas=[.nan, 0.9]", r"optim.betas.0: got nan \(float\); wants: input should be a finite number"),
        ("optim.betas=[0.9, 1.0]", r"optim.betas.1: got 1.0 \(float\); wants: input should be less than 1"),
        ("optim.betas=[-0.1, 0.9]", r"optim.betas.0: got -0.1 .* wants: input should be greater than or equal to 0"),
        ("trainer.steps", r"override 'trainer.steps': wants key.sub=value"),
        ("seed.sub=1", r"override 'seed.sub=1': seed is not a section"),
        ("model.name=[1", r"the value is not YAML"),
    ],
)
def test_bad_keys_and_values_are_named(override: str, message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(TINY.read_text() + "\nseed: 0\n")
    with pytest.raises(ConfigError, match=message):
        load_config(recipe, [override])


def test_addresses_of_servers_are_taken_as_people_write_them() -> None:
    written = (
        "[http://10.0.0.7:8000, http://h:1/, https://h/v1, http://h:2/v1/, 'http://[::1]:8', https://h/team/v1, "
        "/run/V, HTTP://Up:1/Team, http://v1]"
    )
    config = load_config(TINY, ["rollout.engine=vllm", f"rollout.vllm.addresses={written}"])
    known = [
        "http://10.0.0.7:8000",
        "http://h:1",
        "https://h",
        "http://h:2",
        "http://[::1]:8",
        "https://h/team",
        "/run/V",
        "http://up:1/Team",
        "http://v1",
    ]
    assert config.rollout.vllm.addresses == known
    assert load_config(TINY, ["rollout.engine=vllm", f"rollout.vllm.addresses={known}"]) == config


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path)
    del tree["trainer"]["steps"]
    with pytest.raises(ConfigError, match=r"trainer.steps: missing; it has no default"):
        parse_config(tree)


def test_unreadable_recipes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'nowhere.yaml' cannot be read: No such file"):
        load_config("nowhere.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds list; wants sections"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(tmp_path / "broken.yaml")


def test_scientific_notation_is_a_number(tmp_path: Path) -> None:
    """YAML 1.1 reads 2e-5 as text; nobody who writes a recipe expects that."""
    config = load_config(TINY, ["optim.learning_rate=2e-5", "optim.eps=1E-7", "objective.beta=5e-1"])
    assert (config.optim.learning_rate, config.optim.eps, config.objective.beta) == (2e-5, 1e-7, 0.5)


def test_every_key_has_a_meaning_and_a_default() -> None:
    config = load_config(RECIPES / "demo.yaml")
    rows = describe(type(config), dict(config))
    keys = {key for key, _, _ in rows}
    assert {"run.dir", "objective.beta", "task.family", "optim.learning_rate", "checkpoint.every"} <= keys
    assert all(text.strip() for _, _, text in rows)
    assert dict((key, value) for key, value, _ in rows)["objective.beta"] == str(config.objective.beta)
    assert dict((key, value) for key, value, _ in describe())["trainer.steps"] == "required"


def test_commands_take_only_the_task_and_rollouts_of_a_recipe() -> None:
    config = load_sections(
        str(RECIPES / "demo.yaml"), ["task.params.max_digits=1"], model={"name": "x", "revision": None}
    )
    assert (config.model.name, config.task.params["max_digits"], config.rollout.max_new_tokens) == ("x", 1, 16)
    assert config.trainer.steps == 1
    assert load_sections("reasoning_gym", ["task.family=chain_sum"], model={"name": "x"}).task.family == "chain_sum"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["replay.capacity=5"], r"replay.capacity or replay.capacity_tokens is set together with data.trajectories"),
        (["rollout.max_staleness=1"], r"rollout.max_staleness \(1\) is set together with data.trajectories"),
    ],
)
def test_what_a_file_of_trajectories_rules_out(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(TINY, ["data.trajectories=some.jsonl", *overrides])


@pytest.mark.parametrize("setting", ["addresses=[http://localhost:8000]", "transfer=broadcast"])
def test_what_only_servers_take_is_refused_without_them(setting: str) -> None:
    key, _, _ = setting.partition("=")
    with pytest.raises(ConfigError, match=rf"rollout.vllm.{key} is .* but rollout.engine is 'embedded'"):
        load_config(TINY, [f"rollout.vllm.{setting}"])


@pytest.mark.parametrize(("device", "seen"), [("cuda", 0), ("cuda:7", 1), ("cuda:2", 2)])
def test_a_gpu_that_is_not_there_is_named_before_anything_is_loaded_or_written(
    tmp_path: Path, device: str, seen: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: seen)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # so that no hub is asked whether it is there
    recipe = str(TINY)
    assert main(["train", recipe, f"run.dir={tmp_path / 'run'}", "model.name=none/such", f"model.device={device}"]) == 1
    said = f"tbrm train: model.device: {device}; torch sees {seen or 'no'} GPU"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=f"model.device: {device}; torch sees"):  # `tbrm eval`, `score` and `rollout`
        load_policy(load_config(recipe, [f"model.device={device}"]))
    assert ModelConfig(name="tiny", device="auto").resolve_device().type == "cpu"
