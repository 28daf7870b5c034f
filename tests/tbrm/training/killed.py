"""`tbrm` that is killed (SIGKILL) again and again: at random moments, and at every third time inside a checkpoint write.

    KILLS=20 KILLS_SO_FAR=FILE [torchrun ...] -m tests.tbrm.training.killed train RECIPE ... --resume

One process of the run dies at a time. FILE counts the kills, so that it stops after so many.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from tbrm.commands.cli import main
from tbrm.training import checkpoints, trainer


def die() -> None:
    with Path(os.environ["KILLS_SO_FAR"]).open("a") as file:
        file.write(".")
    os.kill(os.getpid(), signal.SIGKILL)


def arrange_death(number: int) -> None:
    """Of this process: a moment after its first step began, or half-way through writing a checkpoint."""
    rng = random.Random(number)
    if number % 3 == 0:
        inside = rng.choice(["hash_of", "dcp.save", "rename"])
        if inside == "hash_of":
            checkpoints.hash_of = lambda *_: die()
        elif inside == "rename":
            real = checkpoints.Checkpoints._link
            checkpoints.Checkpoints._link = lambda *a: die() if rng.random() < 0.5 else real(*a)
        else:
            save = checkpoints.dcp.save
            checkpoints.dcp.save = lambda *a, **k: die() if rng.random() < 0.5 else save(*a, **k)
        return
    begun = trainer.Trainer.train_step

    def train_step(self: Any) -> Any:
        threading.Timer(rng.uniform(0, 1.0), die).start()
        trainer.Trainer.train_step = begun
        return begun(self)

    trainer.Trainer.train_step = train_step


if __name__ == "__main__":
    counter = Path(os.environ["KILLS_SO_FAR"])
    kills = counter.stat().st_size if counter.exists() else 0
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    # Writing a manifest and links is the main process's work, so it is the one to die there.
    victim = 0 if kills % 3 == 0 else random.Random(kills).randrange(size)
    if kills < int(os.environ["KILLS"]) and rank == victim:
        arrange_death(kills)
    sys.exit(main(sys.argv[1:]))
