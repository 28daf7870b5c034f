"""Run in a process of its own, for vLLM leaves its mark on the one it runs in: training with it.

python -m tests.tbrm.rollout.vllm.colocated FOLDER tied|adapted
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tbrm.rollout import Request, Sampling
from tbrm.rollout.vllm.check import StaleWeightsError
from tbrm.rollout.vllm.colocated import ColocatedEngine
from tbrm.training.trainer import Trainer
from tests.tbrm.rollout.vllm.vllm_runs import PROMPTS, assert_answers_are_the_policys, save_model, vllm_config


def state_of_process() -> dict[str, object]:
    return {
        "torch": torch.random.get_rng_state().tolist(),
        "random": random.getstate(),
        "numpy": str(np.random.get_state()),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "cores": os.sched_getaffinity(0),
    }


def main(folder: Path, head: str) -> None:
    """head: tied, or one of its own, which LoRA adapters adapt, as they do other layers."""
    torch.set_num_threads(1)
    model = save_model(folder / "model", tied=head == "tied")
    adapters = ("q_proj", "down_proj", "lm_head") if head == "adapted" else ()
    config = vllm_config(folder / "run", model, "vllm_colocated", adapters=adapters)
    rollout = config.rollout.model_copy(update={"stop_strings": ["@~@~@~@"]})  # which never comes
    trainer = Trainer(config.model_copy(update={"rollout": rollout}))
    engine: ColocatedEngine = trainer.engine.engine
    torch.manual_seed(5)
    before = state_of_process()
    trainer.engine.update_weights(0)
    after = state_of_process()
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, changed
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)

    metrics = trainer.train_step()
    assert metrics["sync/logprob_gap_max"] < 1e-4
    assert trainer.engine.update_weights(1)["sync/logprob_gap_max"] < 1e-4
    assert_answers_are_the_policys(trainer.engine, trainer.policy)

    request = [Request(PROMPTS[0], 1, seed=3)]
    [[free]] = engine.generate(request, Sampling(40))
    plain = engine.ends
    engine.ends = replace(plain, strings=(plain.tokenizer.decode(free.token_ids[4:6]),))
    length = engine.ends.length(free.token_ids)
    [[ended]] = engine.generate(request, Sampling(40))
    assert (ended.token_ids, ended.truncated) == (free.token_ids[:length], False)
    assert length < len(free.token_ids)
    engine.ends = plain

    rpc = engine._llm.collective_rpc
    engine._llm.collective_rpc = lambda *_, **__: None
    trainer.train_step()
    with pytest.raises(StaleWeightsError):
        trainer.engine.update_weights(2)
    engine._llm.collective_rpc = rpc
    trainer.engine.update_weights(2)
    assert_answers_are_the_policys(trainer.engine, trainer.policy)

    handed_over = engine._handover.folder
    trainer.engine.close()
    assert not handed_over.exists()
    assert not torch.distributed.is_initialized()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
