"""A plan from a config."""

from __future__ import annotations

from tbrm.config.schema import Config
from tbrm.config.section import ConfigError
from tbrm.plan.footprint import footprint
from tbrm.plan.inputs import few_of, is_sharded, meta_policy, precision_of, sizes_of, trajectories_of, work_of
from tbrm.plan.terms import Plan
from tbrm.policy.critic import critic_config
from tbrm.policy.sharded import sum_in_float32
from tbrm.policy.vocab_parallel import check_divisible


def make_plan(config: Config, processes: int) -> Plan:
    """From the model's config, the tokenizer and the task's prompts: no weight is read. Raises ValueError."""
    shard = config.parallel.shard or processes
    if processes % shard:
        raise ConfigError(f"parallel.shard: got {shard} for {processes} processes; wants 0 or a divisor of {processes}")
    if config.parallel.cpu_offload and config.model.device == "cpu":
        raise ConfigError("parallel.cpu_offload: true, with model.device cpu; wants a GPU")
    policy, tokenizer = meta_policy(config)
    sizes = sizes_of(policy)
    if config.parallel.vocab_parallel:
        check_divisible(sizes.vocab, shard)
    trajectories = trajectories_of(config, policy, tokenizer)
    if is_sharded(config, processes):  # then weights come to the blocks in the precision of the products
        policy.lm.to(precision_of(config))
        sum_in_float32(policy)
    held = footprint(policy, few_of(trajectories))
    critic = None
    if config.objective.has_critic:
        critic = sizes if config.critic.model is None else sizes_of(meta_policy(critic_config(config))[0])
    return Plan(config, processes, sizes, work_of(config, trajectories, processes), held, critic)
