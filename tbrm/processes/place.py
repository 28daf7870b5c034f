"""Which of how many processes this one is, as its environment says: torchrun, srun, an MPI, a PyTorchJob, or none of them.

Imports no torch: commands that run in one process ask here too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

_NAMES = (
    # rank, how many, rank on its machine
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # PyTorch's own: torchrun, a PyTorchJob, or by hand
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # Open MPI's mpirun
    (
        "PMI_RANK",
        "PMI_SIZE",
        "MPI_LOCALRANKID",
    ),  # mpiexec of MPICH or Intel MPI, which SLURM may start once on each machine
    # srun. Not SLURM_NTASKS: a batch script has that too, and runs once.
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
_MEETING = ("MASTER_ADDR", "MASTER_PORT")


class PlaceError(ValueError):
    """An environment that says half of what a run of several processes must know; the message says which half."""


@dataclass(frozen=True)
class Place:
    """Of a process among those that a launcher started."""

    rank: int
    size: int
    local_rank: int | None
    """Its number on its machine."""
    address: str
    """Where all meet: the machine of rank 0, and a port there."""
    port: int
    named_by: str
    """The variable that the size was read from."""
    torchrun: bool = False
    """Its launcher watches over it, and hosts the meeting."""

    def gpu(self, count: int) -> int:
        """Which of the `count` GPUs that it sees is its own. Raises PlaceError."""
        if count == 1:
            return 0
        if self.local_rank is None:
            raise PlaceError(
                f"LOCAL_RANK is missing: rank {self.rank} sees {count} GPUs, and must know which is its own"
            )
        if self.local_rank >= count:
            raise PlaceError(
                f"rank {self.rank} is number {self.local_rank} on its machine, where it sees {count} GPUs: start fewer "
                "processes, or set model.device=cpu"
            )
        return self.local_rank


def find_place(env: Mapping[str, str] = os.environ) -> Place | None:
    """None: a process by itself. Raises PlaceError."""
    if "TORCHELASTIC_RUN_ID" in env:
        return _place(env, *_NAMES[0], torchrun=True)
    for names in _NAMES:
        rank, size, _ = names
        if env.get(rank) and _number(env, size, default=1) > 1 and not (rank == "PMI_RANK" and _is_of_srun(env)):
            return _place(env, *names)
    # A batch script of SLURM has a rank, 0, though it is alone.
    for rank, size, _ in _NAMES[:-1]:
        for one, other in ((rank, size), (size, rank)):
            if env.get(one) and not env.get(other) and (one, env[one]) != (size, "1"):
                raise PlaceError(
                    f"{one} is {env[one]} and {other} is missing: a run of several processes wants both, and "
                    f"{_meeting_names()}; torchrun sets them. To run one process alone, unset {one}"
                )
    return None


def refuse_several(command: str) -> None:
    """Raises PlaceError where `command`, which one process does alone, was started in several."""
    place = find_place()
    if place is not None and place.size > 1:
        raise PlaceError(
            f"{place.named_by} is {place.size}: {command} is the work of one process; start it without a launcher, or unset "
            f"{place.named_by}"
        )


def _place(env: Mapping[str, str], rank_name: str, size_name: str, local_name: str, *, torchrun: bool = False) -> Place:
    rank, size = _number(env, rank_name), _number(env, size_name)
    if not 0 <= rank < size:
        raise PlaceError(f"{rank_name} is {rank} and {size_name} is {size}: ranks go from 0 to {size - 1}")
    local = next((_number(env, name) for name in (local_name, "LOCAL_RANK") if env.get(name)), None)
    meeting = {
        **(_slurm_meeting(env) if rank_name == "SLURM_PROCID" else {}),
        **{k: env[k] for k in _MEETING if env.get(k)},
    }
    if missing := [name for name in _MEETING if name not in meeting]:
        how = (
            "; mpirun hands on what -x names, as in -x MASTER_ADDR=HOST -x MASTER_PORT=29500"
            if "OMPI" in rank_name
            else ""
        )
        raise PlaceError(
            f"{' and '.join(missing)} missing, with {rank_name} {rank} and {size_name} {size}: {_meeting_names()} say where "
            f"the processes meet{how}. To run one process alone, unset {rank_name} and {size_name}"
        )
    return Place(rank, size, local, meeting["MASTER_ADDR"], _number(meeting, "MASTER_PORT"), size_name, torchrun)


def _is_of_srun(env: Mapping[str, str]) -> bool:
    """Of MPICH's variables: `srun --mpi=pmi2` sets them to what its own say, which know more."""
    return all(env.get(mpich) == env.get(own) for mpich, own in zip(_NAMES[-2][:2], _NAMES[-1][:2], strict=True))


def _slurm_meeting(env: Mapping[str, str]) -> dict[str, str]:
    """The first machine of the step, and a port that is its own: most likely free, and not another step's."""
    if not env.get("SLURM_STEP_NODELIST"):
        return {}
    # node[007-009,12],other: the first of each bracket, up to the first comma outside of them
    first = re.sub(r"\[(\w+)[^]]*\]", r"\1", env["SLURM_STEP_NODELIST"]).split(",")[0]
    number = 16 * _number(env, "SLURM_JOB_ID", default=0) + _number(env, "SLURM_STEP_ID", default=0)
    return {"MASTER_ADDR": first, "MASTER_PORT": str(20_000 + number % 10_000)}


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdecimal():
        raise PlaceError(f"{name} is {text!r}; wants a number, as launchers set it")
    return int(text)


def _meeting_names() -> str:
    return " and ".join(_MEETING)
