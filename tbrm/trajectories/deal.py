"""Which trajectories go into which micro-batch, of which process."""

from __future__ import annotations

from collections.abc import Sequence

from tbrm.trajectories.packing import Load, Packer, common_prefix, loads_of
from tbrm.trajectories.trajectory import Trajectory


def deal(trajectories: Sequence[Trajectory], max_tokens: int, processes: int) -> list[list[list[int]]]:
    """The micro-batches of each process, of at most `max_tokens` packed tokens each: lists of indices.

    Trajectories with the same prompt go side by side so that they can share it. One that alone exceeds the budget gets
    a micro-batch of its own: no trajectory is ever cut.

    The largest share is as small as shares of neighbours can make it. Every process gets the same number of micro-batches,
    since all must run the model together: where a share has fewer, the last ones are empty.
    """
    loads = loads_of(trajectories)

    def prefix_of(indices: Sequence[int]) -> int:
        prompts = {loads[i].prompt for i in indices if loads[i].may_share}
        return common_prefix([trajectories[i].prompt_ids for i in prompts])

    neighbours = sorted(range(len(loads)), key=lambda i: loads[i].prompt)
    prefix = prefix_of(neighbours)
    low, high = 0, max(1, sum(load.prompt_tokens + load.fed for load in loads))
    while processes > 1 and high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_split(neighbours, loads, prefix, middle)) <= processes else (middle, high)
    shares = _split(neighbours, loads, prefix, high)
    dealt = [_split(share, loads, prefix_of(share), max_tokens) for share in shares]
    dealt += [[] for _ in range(processes - len(shares))]
    count = max(map(len, dealt))
    return [batches + [[] for _ in range(count - len(batches))] for batches in dealt]


def _split(indices: Sequence[int], loads: Sequence[Load], prefix: int, max_tokens: int) -> list[list[int]]:
    """Runs of neighbours of at most `max_tokens` packed tokens."""
    batches: list[list[int]] = []
    packer = Packer(prefix)
    for index in indices:
        if not batches or packer.tokens + packer.cost(loads[index]) > max_tokens:
            batches.append([])
            packer = Packer(prefix)
        packer.add(loads[index])
        batches[-1].append(index)
    return batches
