"""Embedding and head divided over processes by the vocabulary: each keeps some rows of both, and nobody ever holds them all.

The processes of a group work on micro-batches of their own, and each of those needs rows from everywhere. So it is the
tokens that travel and not the weights, which are far larger:

    embedding   every process looks up what it holds of everybody's tokens, and each gets the sum of its own
    head        the hidden states that predict an action are gathered; every process computes the statistics of all of them
                over its rows, and the [A] vectors are combined (tbrm_kernels.vocab_parallel)
    loss        is computed by each process of its own trajectories; its derivatives by the statistics, [A] vectors, are shared

T packed tokens, A actions, D hidden width, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import PreTrainedModel

from tbrm.policy.lora import base_layer
from tbrm.trajectories.batch import TrajectoryBatch
from tbrm_kernels import TokenStats, TrajectoryLossFn
from tbrm_kernels.vocab_parallel import sum_gradient


def is_divisible(entries: int, processes: int) -> bool:
    """Whether each of the processes has a row of a vocabulary."""
    return (processes - 1) * -(-entries // processes) < entries


def check_divisible(entries: int, processes: int) -> None:
    """Raises ValueError if one of the processes would have no row of a vocabulary."""
    if not is_divisible(entries, processes):
        raise ValueError(
            f"parallel.vocab_parallel: a vocabulary of {entries} leaves one of {processes} processes without an entry; "
            "set it to false, or parallel.shard to fewer processes"
        )


class DividedVocabulary:
    """The embedding and the head of `lm`, tied or not, with their rows cut over the shard dimension of `mesh`."""

    def __init__(self, lm: PreTrainedModel, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.group = mesh.get_group("shard")
        self.embedding = cast(nn.Embedding, lm.get_input_embeddings())
        # The positions that stand in for tokens (see `VocabParallelPass.embed`) must not be taken for padding.
        self.padding, self.embedding.padding_idx = self.embedding.padding_idx, None
        self._names = [
            (module, name)
            for module in (self.embedding, base_layer(lm.get_output_embeddings()))
            for name, _ in module.named_parameters(recurse=False)
        ]
        entries, processes = self.embedding.num_embeddings, self.group.size()
        check_divisible(entries, processes)
        placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
        cut: dict[nn.Parameter, nn.Parameter] = {}
        for module, name in self._names:
            whole = module.get_parameter(name)
            if whole not in cut:
                # A copy, so that the whole one can go.
                slices = distribute_tensor(whole.detach(), mesh, placements, src_data_rank=None).clone()
                cut[whole] = nn.Parameter(slices, requires_grad=whole.requires_grad)
            setattr(module, name, cut[whole])

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Each once, in the same order on all processes, which take turns by it."""
        return list(dict.fromkeys(module.get_parameter(name) for module, name in self._names))

    def sum_over_copies(self) -> None:
        """Sums the gradients over the groups that hold copies of the model, once a step. Within a group they are sums."""
        if "replicate" in (self.mesh.mesh_dim_names or ()):
            for parameter in self.parameters:
                if parameter.grad is not None:
                    dist.all_reduce(local(parameter.grad), group=self.mesh.get_group("replicate"))

    @contextmanager
    def gathered(self, precision: torch.dtype, device: torch.device) -> Iterator[None]:
        """Within it the transformers model has all rows on every process, to run as it is, without gradient."""
        slices = {pair: pair[0].get_parameter(pair[1]) for pair in self._names}
        whole = {
            parameter: nn.Parameter(
                cast(DTensor, parameter.detach().to(device, precision)).full_tensor(), requires_grad=False
            )
            for parameter in self.parameters
        }
        try:
            for (module, name), parameter in slices.items():
                setattr(module, name, whole[parameter])
            yield
        finally:
            for (module, name), parameter in slices.items():
                setattr(module, name, parameter)


class VocabParallelPass:
    """One pass of a group of processes over a micro-batch of each."""

    def __init__(self, vocabulary: DividedVocabulary, batch: TrajectoryBatch) -> None:
        self.group = vocabulary.group
        self._vocabulary = vocabulary
        self._input_ids = batch.inputs.input_ids
        mine = (len(batch.inputs.input_ids), batch.bounds)
        shares: list[Any] = [None] * self.group.size()
        dist.all_gather_object(shares, mine, group=self.group)
        self._tokens = [tokens for tokens, _ in shares]
        self._actions = [bounds[-1] for _, bounds in shares]
        # The bounds of everybody's trajectories, in the order of ranks, and which trajectories and actions are ours.
        self._bounds = [0]
        for _, bounds in shares:
            self._bounds += [self._bounds[-1] + bound for bound in bounds[1:]]
        rank = self.group.rank()
        first = sum(len(bounds) - 1 for _, bounds in shares[:rank])
        self._trajectories = range(first, first + len(mine[1]) - 1)
        self._own_actions = slice(sum(self._actions[:rank]), sum(self._actions[: rank + 1]))
        per_process = -(-vocabulary.embedding.num_embeddings // self.group.size())
        self.entries = slice(rank * per_process, (rank + 1) * per_process)
        """Of the vocabulary, this process's."""
        self.cu_seqlens = batch.cu_seqlens.new_tensor(self._bounds)
        self.targets = _gather(batch.targets, self._actions, self.group)

    def embed(self) -> Tensor:
        """What the model's embedding says of the batch's tokens, [T, D]."""
        embedding, weight = self._vocabulary.embedding, self._vocabulary.embedding.weight
        ids = _gather(self._input_ids, self._tokens, self.group)
        rows = _Lookup.apply(
            self.rows(weight), ids, self.entries.start, self._vocabulary.padding, self._tokens, self.group
        )
        # Through the module all the same, which may scale: its weight is now what was found, a row for each token.
        positions = torch.arange(len(rows), device=rows.device)
        embedded: Tensor = torch.func.functional_call(embedding, {"weight": rows}, (positions,))
        return embedded

    def rows(self, weight: Tensor) -> Tensor:
        """This process's rows of a divided weight, where the model runs."""
        return local(weight).to(self._input_ids.device)

    @contextmanager
    def logits_of_all(self, lm: PreTrainedModel) -> Iterator[None]:
        """Within it the head of `lm` makes logits over the whole vocabulary of hidden states that all processes have alike. For
        a few tokens, without gradient and adapters."""
        head: Any = lm.get_output_embeddings()
        rows = [0] * self.group.size()
        dist.all_gather_object(rows, len(local(head.weight)), group=self.group)

        def logits(_module: nn.Module, _inputs: Any, hidden: Tensor) -> Tensor:
            bias = None if head.bias is None else self.rows(head.bias)
            mine = nn.functional.linear(hidden, self.rows(head.weight), bias)
            return _gather(mine.movedim(-1, 0).contiguous(), rows, self.group).movedim(0, -1)

        stand_in = nn.Identity()
        stand_in.register_forward_hook(logits)
        lm.set_output_embeddings(stand_in)
        try:
            yield
        finally:
            lm.set_output_embeddings(head)

    def gather(self, hidden: Tensor) -> Tensor:
        """Everybody's [A, D] from this process's, in the order of `targets`."""
        gathered: Tensor = _Gather.apply(hidden, self._actions, self.group)
        return gathered

    def mine(self, stats: TokenStats) -> TokenStats:
        """Of everybody's statistics those of this process's actions."""
        return _some(_shared(stats, self.group), self._own_actions)

    def loss_of_mine(self, loss_fn: TrajectoryLossFn) -> TrajectoryLossFn:
        """The loss of this process's trajectories alone, of a chunk that may hold anybody's; differentiated in the statistics
        it gives the derivatives of everybody's losses."""

        def loss(stats: TokenStats, cu_seqlens: Tensor, first: int) -> Tensor:
            shared = _shared(stats, self.group)
            own = range(max(first, self._trajectories.start), min(first + len(cu_seqlens) - 1, self._trajectories.stop))
            nothing = shared[:, :0].sum()  # yet what the others' derivatives come through
            if not own:
                return nothing
            start, stop = (self._bounds[i] - self._bounds[first] for i in (own.start, own.stop))
            bounds = cu_seqlens[own.start - first : own.stop - first + 1] - start
            mine = loss_fn(_some(shared, slice(start, stop)), bounds, own.start - self._trajectories.start)
            return mine + nothing

        return loss


def local(tensor: Tensor) -> Tensor:
    """This process's slice of a DTensor; differentiable."""
    return cast(DTensor, tensor).to_local()


def _shared(stats: TokenStats, group: dist.ProcessGroup) -> Tensor:
    """[2 or 3, A], whose gradient will be the sum of those of the processes."""
    return sum_gradient(torch.stack([values for values in stats if values is not None]), group)


def _some(shared: Tensor, actions: slice) -> TokenStats:
    logprobs, lse, *entropy = shared[:, actions]
    return TokenStats(logprobs, lse, entropy[0] if entropy else None)


def _gather(rows: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """The rows of all processes, `sizes` of them; nothing is padded."""
    everybodys = rows.new_empty(sum(sizes), *rows.shape[1:])
    parts = everybodys.split(list(sizes))
    parts[group.rank()].copy_(rows)
    pending = [
        dist.broadcast(part, group=group, group_src=rank, async_op=True) for rank, part in enumerate(parts) if len(part)
    ]
    for work in pending:
        work.wait()
    return everybodys


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
        ctx.own = slice(sum(sizes[: group.rank()]), sum(sizes[: group.rank() + 1]))
        return _gather(rows, sizes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.own], None, None  # the kernels have summed it over the processes


class _Lookup(torch.autograd.Function):
    """The rows of the tokens of this process, [T, D], each from the process that holds it. One process is served after the
    other, so that nobody ever holds the rows of all tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        ids: Tensor,
        first: int,
        padding: int | None,
        sizes: Sequence[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        wanted = []
        for rank, part in enumerate(ids.split(list(sizes))):
            owned = (part >= first) & (part < first + len(weight))
            entries = torch.where(owned, part - first, 0)
            rows = weight[entries].masked_fill_(~owned[:, None], 0)
            dist.reduce(rows, group=group, group_dst=rank)
            if rank == group.rank():
                found = rows
            wanted.append((entries, owned if padding is None else owned & (part != padding)))
        ctx.wanted, ctx.group, ctx.shape = wanted, group, weight.shape
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_weight = grad.new_zeros(ctx.shape)
        for rank, (entries, owned) in enumerate(ctx.wanted):
            mine = rank == ctx.group.rank()
            rows = grad.contiguous() if mine else grad.new_empty(len(entries), grad.shape[1])
            dist.broadcast(rows, group=ctx.group, group_src=rank)
            of_weight.index_add_(0, entries, rows * owned[:, None])
        return of_weight, None, None, None, None, None
