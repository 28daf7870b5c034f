"""What other trainers call our keys, and the key that was meant by one that there is not."""

from __future__ import annotations

import difflib
from collections.abc import Collection

SYNONYMS = {
    "lr": "optim.learning_rate",
    "lr_scheduler_type": "optim.schedule",
    "warmup": "optim.warmup_steps",
    "warmup_ratio": "optim.warmup_steps",
    "grad_clip": "optim.max_grad_norm",
    "gradient_clipping": "optim.max_grad_norm",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "kl_coef": "objective.beta",
    "kl_coeff": "objective.beta",
    "kl_beta": "objective.beta",
    "init_kl_coef": "objective.beta",
    "loss_type": "objective.name",
    "ref_model_sync_steps": "objective.reset_reference_every",
    "num_generations": "rollout.samples",
    "num_return_sequences": "rollout.samples",
    "group_size": "rollout.samples",
    "per_device_train_batch_size": "rollout.prompts",
    "train_batch_size": "rollout.prompts",
    "generation_batch_size": "rollout.prompts",
    "max_completion_length": "rollout.max_new_tokens",
    "max_response_length": "rollout.max_new_tokens",
    "max_tokens": "rollout.max_new_tokens",
    "max_prompt_length": "rollout.max_prompt_tokens",
    "num_iterations": "rollout.updates",
    "use_vllm": "rollout.engine",
    "gradient_accumulation_steps": "trainer.batch_tokens",
    "micro_batch_size": "trainer.batch_tokens",
    "max_steps": "trainer.steps",
    "num_steps": "trainer.steps",
    "num_train_epochs": "trainer.steps",
    "epochs": "trainer.steps",
    "output_dir": "run.dir",
    "model_name_or_path": "model.name",
    "torch_dtype": "model.precision",
    "dtype": "model.precision",
    "bf16": "model.precision",
    "attn_implementation": "model.attention",
    "gradient_checkpointing": "parallel.activation_checkpointing",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "target_modules": "lora.targets",
    "eval_steps": "evaluation.every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "report_to": "logging.wandb",
    "reward_funcs": "task.verifier",
    "reward_fn": "task.verifier",
    "train_file": "task.path",
    "dataset": "task.path",
    "dataset_name": "task.path",
}
"""By the last part of a key: names of TRL, transformers, verl and others. Those that are spelt nearly alike need no line."""


def meant_by(key: str, known: Collection[str]) -> str | None:
    """The key, or the section, of `known` ones that somebody most likely meant by one that is not there."""
    *sections, leaf = key.split(".")
    ours = SYNONYMS.get(leaf.lower().replace("-", "_"))
    if ours and (ours in known or not ours.startswith("task.")):  # a task's keys are its own
        return ours
    sought = [(key, {other: other for other in known}), (leaf, {other.rsplit(".", 1)[-1]: other for other in known})]
    if not sections:
        sought.insert(0, (key, {section: section for section in (other.partition(".")[0] for other in known)}))
    for name, candidates in sought:
        if near := difflib.get_close_matches(name, list(candidates), n=1):
            return candidates[near[0]]
    return None
