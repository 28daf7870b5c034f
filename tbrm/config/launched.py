"""What does not go together under a launcher, where a recipe alone is right."""

from __future__ import annotations

from tbrm.config.schema import Config
from tbrm.config.section import ConfigError


def check_launched(config: Config, *, processes: int, sharded: bool) -> None:
    """Raises ConfigError."""
    rollout = config.rollout
    if rollout.max_staleness and rollout.engine == "embedded" and sharded:
        raise ConfigError(
            f"rollout.max_staleness: {rollout.max_staleness} under torchrun, where no process has the weights that "
            "its own engine would need beside training; set rollout.engine to vllm, or this to 0"
        )
    patience = rollout.vllm.start_timeout + rollout.vllm.request_timeout
    if rollout.engine == "vllm" and processes > 1 and config.parallel.timeout <= patience:
        raise ConfigError(
            f"parallel.timeout: {config.parallel.timeout} s, in which others wait for a process that waits for a server: "
            f"raise it above {patience} s, rollout.vllm.start_timeout and request_timeout together, or lower these"
        )
