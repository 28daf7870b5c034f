"""Rollouts beside training: a thread that lets the engine answer the problems of later steps while the trainer updates.

Which weights answer what is a function of the step, and never of the clock: with `rollout.max_staleness` s, the rollout that
step k trains on first is made with the weights of version max(0, k - 1 - s). So a run repeats itself bit for bit::

    s = 2       step 1    step 2    step 3    step 4    step 5
    trained on   v0        v0        v0        v1        v2         version that made it
    begun        1, 2, 3   4         5         6         7          rollout for step ..., once the step begins

The engine takes its weights from the policy, which changes in the optimiser's step and nowhere else. So that step waits for
the rollouts that still want the weights as they are. What is in the making at a checkpoint is finished first and saved with
it, since the weights that make it will be gone.

Weights in slices are sent by all processes together, between one step and the next: once the rollouts under way have ended.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch

from tbrm.config.rollout import RolloutConfig
from tbrm.experience.collect import Collected, RolloutSource
from tbrm.experience.supply import Supply
from tbrm.reporting.metrics import Phases

_CLOSE_SECONDS = 10.0


class RolloutLateError(TimeoutError):
    """A rollout beside training that took longer than `rollout.timeout`."""


@dataclass
class _Rollout:
    step: int
    """The first one that is to train on it."""
    version: int
    has_weights: threading.Event
    """Shared by all of its version: the engine has taken these weights."""
    transfer: dict[str, float] | None
    """What the engine said of them; None: they are yet to be sent."""
    result: Future[Collected] = field(default_factory=Future)


class SupplyAhead(Supply):
    """Collects up to `rollout.max_staleness` steps ahead, in order, in a thread of its own; an engine that has weights of its
    own must answer. A failure there is raised in `collect`, or where the weights are wanted back."""

    def __init__(
        self, source: RolloutSource, config: RolloutConfig, steps: int, optimizer: torch.optim.Optimizer
    ) -> None:
        super().__init__(source, config.updates)
        self.config = config
        self.steps = steps
        self._rollouts = source
        self._under_way: deque[_Rollout] = deque()
        self._begun: SimpleQueue[_Rollout | None] = SimpleQueue()
        self._closing = threading.Event()
        # Daemonic: whatever it hangs in, the process can end.
        self._thread = threading.Thread(target=self._work, args=(torch.get_num_threads(),), name="rollout", daemon=True)
        source.chat = copy.deepcopy(source.chat)  # a tokenizer is not for two threads
        optimizer.register_step_pre_hook(lambda *_: self._wait_until_weights_are_taken())

    def collect(self, step: int, phases: Phases) -> Collected:
        self._begin_rollouts(step, phases)
        with phases("wait"):
            while not self.waiting:
                self._receive()
        return self.waiting.popleft()

    def _begin_rollouts(self, step: int, phases: Phases) -> None:
        """Those that want the weights as they are before update `step`."""
        served = step + len(self.waiting) + len(self._under_way) * self.updates  # the first step that has nothing yet
        last = min(self.steps, step + self.config.max_staleness)
        if served > last:
            return
        has_weights, transfer = threading.Event(), None
        if self._rollouts.world.mesh is not None:
            self.settle(phases)
            transfer = self._rollouts.update_weights(step - 1, phases)
        while served <= last:
            rollout = _Rollout(served, step - 1, has_weights, transfer)
            self._under_way.append(rollout)
            self._begun.put(rollout)
            served += self.updates
        if self._thread.ident is None:
            self._thread.start()

    def _receive(self) -> None:
        rollout = self._under_way[0]
        try:
            collected = rollout.result.result(self.config.timeout)
        except TimeoutError:
            if rollout.result.done():  # its own
                raise
            raise self._late(rollout, "has not ended") from None
        self._under_way.popleft()
        self.waiting.extend(collected.split(self.updates))

    def _wait_until_weights_are_taken(self) -> None:
        for rollout in self._under_way:
            if not rollout.has_weights.wait(self.config.timeout):
                raise self._late(rollout, "could not begin")
            if rollout.result.done():
                rollout.result.result()  # raises what it raised

    def _late(self, rollout: _Rollout, what: str) -> RolloutLateError:
        return RolloutLateError(
            f"the rollout for step {rollout.step} {what} within {self.config.timeout} s (rollout.timeout); raise it if "
            "rollouts take so long, or see what the engine hangs in"
        )

    def settle(self, phases: Phases) -> None:
        """Waits for all rollouts that have begun. From then on the engine and the tokenizer are free for others."""
        with phases("wait"):
            while self._under_way:
                self._receive()

    def close(self) -> None:
        """Gives up what has begun. An engine that goes on regardless is not waited for long."""
        self._closing.set()
        self._begun.put(None)
        self._rollouts.engine.close()
        if self._thread.ident is not None:
            self._thread.join(timeout=_CLOSE_SECONDS)

    def _work(self, threads: int) -> None:
        """Makes the rollouts in the order in which they were begun.

        Gradient mode, autocast and the number of OpenMP threads are each thread's own. The random numbers that `generate`
        seeds and takes are the process's: training takes none.
        """
        torch.set_num_threads(threads)
        failure: BaseException | None = None
        while (rollout := self._begun.get()) is not None and not self._closing.is_set():
            try:
                if failure is not None:  # what comes after it would be made of the wrong problems
                    raise failure
                rollout.result.set_result(self._make(rollout))
            except BaseException as error:
                failure = error
                rollout.result.set_exception(error)
            finally:
                rollout.has_weights.set()

    def _make(self, rollout: _Rollout) -> Collected:
        phases = Phases(
            torch.device("cpu")
        )  # not to wait for what training does on a GPU; responses are on the CPU anyway
        transfer = rollout.transfer
        if transfer is None:
            transfer = self._rollouts.update_weights(rollout.version, phases)
        rollout.has_weights.set()
        collected = self._rollouts.roll_out(rollout.step, phases)
        beside = {key.replace("seconds/", "seconds_beside/"): value for key, value in phases.take().items()}
        collected.metrics |= transfer | beside
        return collected
