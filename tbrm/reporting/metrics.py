"""What a run measures: its log files, the seconds of its phases and its peak memory.

Steps are counted so: line `step` n of metrics.jsonl is the n-th update, from 1; a checkpoint or an evaluation at step k
stands after k updates, so that an evaluation at 0 is of the untrained model.
"""

from __future__ import annotations

import importlib
import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch  # loaded by those who measure, not by those who read what was measured

Metric = float | int | str

WARNING = "warning/"
"""Of the keys in a step's line of metrics.jsonl under which a warning is, for the report, and for a run that goes on."""

TIMING_PREFIXES = ("seconds/", "seconds_beside/", "tokens_per_second", "peak_memory_mib")
"""Of the metrics that differ between equal runs. All others are the same, number for number."""


def is_timing(key: str) -> bool:
    """Whether the metric called `key` may differ between two runs of the same recipe and seed."""
    return key.startswith(TIMING_PREFIXES)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file that may still be being written.

    A line counts once its newline is there: what follows the last newline was cut off by a kill, and is left out.
    Raises ValueError, naming file and line, if a line before it is not JSON.
    """
    return [row for _, row in _lines_and_rows(path)]


def parsed_lines(path: Path) -> Iterator[tuple[bytes, Any]]:
    """The whole lines of a JSON-lines file, and what each holds: where that is not JSON, the ValueError that names it."""
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            yield line, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield line, ValueError(f"line {number} is not JSON ({error})")


def _lines_and_rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    for line, row in parsed_lines(path):
        if isinstance(row, ValueError):
            raise ValueError(f"{path}, {row}: mend or delete that line")
        yield line, row


def _cut_after(path: Path, last_step: int) -> None:
    """Drops the rows of steps past `last_step`, and a half-written last line: the file is replaced in one move."""
    if path.exists():
        kept = [line + b"\n" for line, row in _lines_and_rows(path) if row["step"] <= last_step]
        rewritten = path.with_suffix(".jsonl.part")
        rewritten.write_bytes(b"".join(kept))
        rewritten.replace(path)


class MetricsLog:
    """Writes metrics.jsonl, eval.jsonl and TensorBoard events in `run_dir`, and to Weights & Biases if asked.

    Every row is on its way to the disk when the call returns: a kill loses nothing but a row half written. NaN and
    infinities, which JSON does not have, are written as null; TensorBoard and wandb get them as they are.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        config: dict[str, Any] | None = None,
        wandb: bool = False,
        resume_step: int | None = None,
    ) -> None:
        """`resume_step` is the step of the checkpoint that the run goes on from: rows of later steps, which will be run
        again, are dropped. Without it the run starts afresh, and so do the files. `config` is shown by wandb."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only training needs it

        run_dir.mkdir(parents=True, exist_ok=True)
        self._wandb = _start_wandb(run_dir, config, resume=resume_step is not None) if wandb else None
        paths = [run_dir / "metrics.jsonl", run_dir / "eval.jsonl"]
        if resume_step is not None:
            for path in paths:
                _cut_after(path, resume_step)
        mode = "w" if resume_step is None else "a"
        self._metrics, self._evals = (path.open(mode, encoding="utf-8") for path in paths)
        # TensorBoard hides what earlier files of the folder hold at or past the purge step.
        purge_step = 0 if resume_step is None else resume_step + 1
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)

    def log(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """The row of update `step`, after `step` in the order given. Text goes to metrics.jsonl alone."""
        self._write(self._metrics, "train", step, metrics)

    def log_eval(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """The row of the evaluation after `step` updates."""
        self._write(self._evals, "eval", step, metrics)

    def _write(self, file: IO[str], group: str, step: int, metrics: Mapping[str, Metric]) -> None:
        row = {"step": step} | {key: _json_value(key, value) for key, value in metrics.items()}
        file.write(json.dumps(row, allow_nan=False) + "\n")
        file.flush()
        numbers = {
            key if "/" in key else f"{group}/{key}": float(value)
            for key, value in metrics.items()
            if not isinstance(value, str)
        }
        for tag, number in numbers.items():
            self._tensorboard.add_scalar(tag, number, step)
        self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self, exit_code: int = 0) -> None:
        """Closes the files. wandb shows the run as failed unless `exit_code` is 0."""
        self._metrics.close()
        self._evals.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=exit_code)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.close(exit_code=0 if error_type is None else 1)


def _json_value(key: str, value: Metric) -> Metric | None:
    if not isinstance(value, float | int | str):
        raise TypeError(f"metric {key!r} is {value!r} ({type(value).__name__}): give a Python number or text")
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _start_wandb(run_dir: Path, config: dict[str, Any] | None, resume: bool) -> Any:
    """A wandb run, the same one again when resuming: wandb itself ignores the steps that it has already seen."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise ModuleNotFoundError(
            "logging.wandb is on, but wandb is not installed: pip install 'tbrm[wandb]', or set logging.wandb=false"
        ) from error
    id_file = run_dir / "wandb_id.txt"
    known_id = id_file.read_text() if resume and id_file.exists() else None
    run = wandb.init(
        project="tbrm",
        name=run_dir.name,
        dir=str(run_dir),
        config=config,
        id=known_id,
        resume="allow" if known_id else None,
    )
    id_file.write_text(run.id)
    return run


class Phases:
    """Seconds spent per phase of a step: ``with phases("rollout"): ...``, then ``phases.take()``. Not to be nested."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + self._now() - start

    def take(self) -> dict[str, float]:
        """{"seconds/PHASE": seconds} of each phase since the last call, in the order in which they first ran."""
        taken = {f"seconds/{phase}": seconds for phase, seconds in self._seconds.items()}
        self._seconds.clear()
        return taken

    def _now(self) -> float:
        if self._device.type == "cuda":
            import torch

            # A GPU works behind the program's back: unless waited for, its time would be counted to a later phase.
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


_LINUX_STATUS = Path("/proc/self/status")


def peak_memory_mib(device: torch.device) -> float:
    """The most memory held so far, in MiB: of torch's allocator on a GPU, of the whole process elsewhere."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    if _LINUX_STATUS.exists():  # where getrusage starts with the size of the process that launched this one
        return int(_LINUX_STATUS.read_text().partition("VmHWM:")[2].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
