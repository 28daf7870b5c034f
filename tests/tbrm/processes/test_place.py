"""Which process of how many this one is, by the environments that launchers make."""

from __future__ import annotations

import pytest

from tbrm.commands.cli import main
from tbrm.processes.place import Place, PlaceError, find_place

MEETING = {"MASTER_ADDR": "node7", "MASTER_PORT": "29511"}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "7000",
    "SLURM_STEP_ID": "2",
}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}

MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1"}


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2", **MEETING}, Place(1, 2, None, "node7", 29511, "WORLD_SIZE")),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **MEETING}, Place(0, 2, 0, "node7", 29511, "WORLD_SIZE")),
        ({**MPIRUN, **MEETING}, Place(1, 2, 1, "node7", 29511, "OMPI_COMM_WORLD_SIZE")),
        ({**MPICH, **MEETING}, Place(5, 8, 1, "node7", 29511, "PMI_SIZE")),
        # Within a job of SLURM, srun starts MPICH's own helper, once on each machine.
        ({**MPICH, **SRUN, **MEETING}, Place(5, 8, 1, "node7", 29511, "PMI_SIZE")),
        ({**SRUN, **MEETING}, Place(3, 4, 1, "node7", 29511, "SLURM_STEP_NUM_TASKS")),
        # srun --mpi=pmi2
        (
            {**SRUN, "PMI_RANK": "3", "PMI_SIZE": "4", **MEETING},
            Place(3, 4, 1, "node7", 29511, "SLURM_STEP_NUM_TASKS"),
        ),
        # A batch script that sets the size for all, and srun that gives each its rank.
        ({**SRUN, "WORLD_SIZE": "4", **MEETING}, Place(3, 4, 1, "node7", 29511, "SLURM_STEP_NUM_TASKS")),
        (
            {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **SRUN, **MEETING},
            Place(0, 1, 0, "node7", 29511, "WORLD_SIZE", torchrun=True),
        ),
    ],
)
def test_a_process_has_the_place_that_its_launcher_gave_it(env: dict[str, str], place: Place) -> None:
    assert find_place(env) == place


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node[007-009,12],other", "node007"), ("gpu3", "gpu3"), ("r[1-2]n[04-08]", "r1n04"), ("a,b", "a")],
)
def test_srun_needs_no_address_since_the_step_names_its_machines(nodes: str, first: str) -> None:
    place = find_place({**SRUN, "SLURM_STEP_NODELIST": nodes})
    assert place is not None and place.address == first
    assert 20_000 <= place.port < 30_000
    another = find_place({**SRUN, "SLURM_STEP_ID": "3", "SLURM_STEP_NODELIST": nodes})
    assert another is not None and another.port != place.port


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1"},
        {"LOCAL_RANK": "3", **MEETING},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"},  # a batch script, which runs once
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
    ],
)
def test_a_process_by_itself_has_none(env: dict[str, str]) -> None:
    assert find_place(env) is None


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"WORLD_SIZE": "2", **MEETING}, "WORLD_SIZE is 2 and RANK is missing: .* unset WORLD_SIZE"),
        ({"RANK": "0", **MEETING}, "RANK is 0 and WORLD_SIZE is missing"),
        ({"PMI_RANK": "1", **MEETING}, "PMI_RANK is 1 and PMI_SIZE is missing"),
        (MPICH, "MASTER_ADDR and MASTER_PORT missing, with PMI_RANK 5 and PMI_SIZE 8"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT missing, with RANK 1 and WORLD_SIZE 2"),
        ({**MPIRUN, "MASTER_ADDR": "a"}, r"MASTER_PORT missing, .* -x MASTER_ADDR=HOST -x MASTER_PORT=29500\. To run"),
        ({"RANK": "2", "WORLD_SIZE": "2", **MEETING}, "RANK is 2 and WORLD_SIZE is 2: ranks go from 0 to 1"),
        ({"RANK": "one", "WORLD_SIZE": "2", **MEETING}, "RANK is 'one'; wants a number"),
    ],
)
def test_half_a_place_is_refused_by_name(env: dict[str, str], message: str) -> None:
    with pytest.raises(PlaceError, match=message):
        find_place(env)


def test_a_process_takes_the_gpu_of_its_number_or_the_only_one_it_sees() -> None:
    place = Place(5, 8, 1, "a", 1, "WORLD_SIZE")
    assert place.gpu(4) == 1
    assert place.gpu(1) == 0
    with pytest.raises(PlaceError, match="rank 5 is number 1 on its machine, where it sees 0 GPUs"):
        place.gpu(0)
    with pytest.raises(PlaceError, match="LOCAL_RANK is missing: rank 5 sees 4 GPUs"):
        Place(5, 8, None, "a", 1, "WORLD_SIZE").gpu(4)


@pytest.mark.parametrize("command", [["report", "run"], ["export", "run", "out"], ["score", "tiny", "x.jsonl"]])
def test_a_command_of_one_process_is_refused_in_several(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", **MEETING}.items():
        monkeypatch.setenv(name, value)
    assert main(command) == 1
    assert f"WORLD_SIZE is 2: tbrm {command[0]} is the work of one process" in capsys.readouterr().err
