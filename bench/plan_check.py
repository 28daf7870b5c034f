"""Whether `tbrm plan` foretells what a run takes: two models on 1, 2 and 4 processes, each run in fresh processes.

    make bench-plan

Two steps of training, rollouts included. `peak_memory_mib` of metrics.jsonl, of the process that holds most, less what an
idle process holds that has imported the trainer. glibc is told to give back all that is freed, and oneDNN to keep the code of
few products (docs/scaling.md): the plan counts what is alive.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench.machine import processor
from tbrm.policy.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[1]
RECIPE = str(ROOT / "recipes/chain_sum.yaml")
MIB = 2**20
TOLERANCE = 0.15
SETTINGS = (
    *("rollout.prompts=64", "trainer.steps=2", "optim.warmup_steps=0", "evaluation.prompts=0"),
    *("model.device=cpu", "model.precision=bfloat16"),
)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
# Not ru_maxrss: what a process starts with there is the size of the one that started it.
IDLE = "import tbrm.training.trainer, re; print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])"


def main(out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        random = Path(folder) / "random"
        make_random_model(random)
        # Micro-batches that have to be added up, with tied embeddings; and all in one, untied.
        smollm, qwen = ["trainer.batch_tokens=384"], [f"model.name={random}", "trainer.batch_tokens=4096"]
        cases = (
            ("SmolLM2-135M-Instruct", smollm, (1, 2, 4)),
            ("the same, vocab_parallel", [*smollm, "parallel.vocab_parallel=true"], (2, 4)),
            ("the same, LoRA of rank 16", [*smollm, "lora.rank=16"], (1, 4)),
            ("random Qwen3, 89M", qwen, (1, 2, 4)),
            ("the same, vocab_parallel", [*qwen, "parallel.vocab_parallel=true"], (2, 4)),
        )
        os.environ.update(ENVIRONMENT)
        idle = int(python("-c", IDLE)) / 1024
        rows, wrong = [], []
        for name, overrides, counts in cases:
            for processes in counts:
                row, ratio = check(name, [*SETTINGS, *overrides], processes, idle, Path(folder) / "run")
                print(row, flush=True)
                rows.append(row)
                if abs(ratio - 1) > TOLERANCE:
                    wrong.append(row)
    out.write_text(HEAD.format(processor=processor(), torch=torch.__version__, idle=idle) + "\n".join(rows) + "\n")
    if wrong:
        sys.exit("\n".join([f"planned and measured differ by more than {TOLERANCE:.0%}:", *wrong]))


def check(name: str, overrides: Sequence[str], processes: int, idle: float, run: Path) -> tuple[str, float]:
    """The table's row, and planned over measured."""
    plan = json.loads(python("-m", "tbrm", "plan", RECIPE, "--gpus", str(processes), "--json", *overrides))
    measured, planned = peak_mib(overrides, processes, run) - idle, plan["peak"] / MIB
    phase = max(plan["phases"], key=plan["phases"].get)
    size = f"{plan['tokens']:,}"
    row = f"| {name} | {processes} | {size} | {planned:.0f} ({phase}) | {measured:.0f} | {planned / measured:.2f} |"
    return row, planned / measured


def peak_mib(overrides: Sequence[str], processes: int, run: Path) -> float:
    """Of the process that holds most, in a run of its own."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    python(*launcher, "-m", "tbrm", "train", RECIPE, "--overwrite", *overrides, f"run.dir={run}")
    peak: float = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["peak_memory_mib"]
    return peak


def python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"python {' '.join(arguments)}\n{done.stderr}")
    return done.stdout


def make_random_model(folder: Path) -> None:
    """Untied, with grouped queries, and a vocabulary that its tokenizer does not use up."""
    tokenizer = tiny_tokenizer()
    config = Qwen3Config(
        vocab_size=32768,
        hidden_size=640,
        intermediate_size=1920,
        num_hidden_layers=10,
        num_attention_heads=10,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


HEAD = """Made by `make bench-plan` on {processor}, torch {torch}, gloo: recipes/chain_sum.yaml with 64 prompts a step, two
steps, bfloat16 products. Planned: by `tbrm plan`, and the phase of its peak. Measured: `peak_memory_mib` of the process that
holds most, in fresh processes, less the {idle:.0f} MiB of an idle one.

| model | processes | tokens of a micro-batch, at most | planned, MiB | measured, MiB | planned / measured |
|---|---|---|---|---|---|
"""


if __name__ == "__main__":
    main(Path(sys.argv[1]))
