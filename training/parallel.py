"""Train with one single-threaded process per core. Knows steps, seeds and checkpoints, but no model.

One process with as many threads synchronises thousands of times a step and collapses when the machine has
other work; processes that share one flat gradient synchronise once. Each step draws from a seed of its own,
so a run that was interrupted goes on as if it had not been.
"""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

OUT = Path(__file__).parent / "out"
WORLD = 2
MAX_PARAMETERS = 12_000_000
BARRIER_WAIT_S = 900.0
WARM_UP = 0.02
FINAL_RATE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """What one training stage needs to know besides its model and loss; `batch` is per process."""

    name: str
    steps: int
    batch: int
    learning_rate: float
    seed: int
    weight_decay: float = 0.01
    ema: float = 0.998
    save_every: int = 200

    @property
    def checkpoint(self) -> Path:
        return OUT / "checkpoints" / f"{self.name}.pt"

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, then cosine down to a fiftieth."""
        done = step / self.steps
        if done < WARM_UP:
            return self.learning_rate * (done + 1 / self.steps) / WARM_UP
        cosine = 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))
        return self.learning_rate * (FINAL_RATE + (1 - FINAL_RATE) * cosine)


@dataclass(frozen=True, slots=True)
class TrainingProcess:
    """One process's place in the group; `shared` holds every process's gradient, twice, for steps in turn."""

    rank: int
    shared: Tensor
    barrier: Any

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def mean(self, gradient: Tensor, step: int) -> None:
        """Replace the gradient by its mean over all processes."""
        slot = self.shared[step % 2]
        slot[self.rank, : gradient.numel()].copy_(gradient)
        self.barrier.wait(BARRIER_WAIT_S)
        torch.sum(slot[:, : gradient.numel()], 0, out=gradient)
        gradient.div_(WORLD)


class TrainedWeights:
    """The trainable parameters of some modules as one vector, with AdamW and a moving average."""

    def __init__(self, modules: list[nn.Module], plan: TrainingPlan) -> None:
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        self.size = sum(p.numel() for p in parameters)
        self.vector = nn.Parameter(torch.empty(self.size))
        self.vector.grad = torch.zeros(self.size)
        self._adopt(parameters)
        self.average = self.vector.detach().clone()
        self.plan = plan
        decay = plan.weight_decay
        self.adam = torch.optim.AdamW([self.vector], betas=(0.9, 0.99), weight_decay=decay, fused=True)

    def _adopt(self, parameters: list[nn.Parameter]) -> None:
        """Make each parameter and its gradient a view of the vectors."""
        start = 0
        for parameter in parameters:
            end = start + parameter.numel()
            view = self.vector.data[start:end].view(parameter.shape)
            view.copy_(parameter.data)
            parameter.data = view
            parameter.grad = self.vector.grad[start:end].view(parameter.shape)
            start = end

    def update(self, worker: TrainingProcess, step: int) -> None:
        """One optimizer step on the mean gradient, clipped to length 1, or none if it is not finite."""
        gradient = self.vector.grad
        worker.mean(gradient, step)
        length = float(gradient.norm())
        if math.isfinite(length):
            gradient.mul_(1 / max(1.0, length))
            self.adam.param_groups[0]["lr"] = self.plan.rate(step)
            self.adam.step()
            self.average.lerp_(self.vector.data, 1 - min(self.plan.ema, (2 + step) / (11 + step)))
        gradient.zero_()

    def swap(self) -> None:
        """Exchange the live weights and their average."""
        live = self.vector.data.clone()
        self.vector.data.copy_(self.average)
        self.average.copy_(live)

    def save(self, step: int) -> None:
        """Write the checkpoint; a kill while writing leaves the one before."""
        path = self.plan.checkpoint
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {"step": step, "vector": self.vector.data, "average": self.average}
        torch.save(state | {"adam": self.adam.state_dict()}, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def resume(self) -> int:
        """Load the checkpoint if there is one; returns the step to go on with."""
        if not self.plan.checkpoint.exists():
            return 0
        state = torch.load(self.plan.checkpoint, weights_only=True)
        self.vector.data.copy_(state["vector"])
        self.average.copy_(state["average"])
        self.adam.load_state_dict(state["adam"])
        return state["step"]


class TrainingLog:
    """One JSON line each fifty steps: step, smoothed loss, seconds."""

    def __init__(self, plan: TrainingPlan) -> None:
        (OUT / "logs").mkdir(parents=True, exist_ok=True)
        self.path = OUT / "logs" / f"{plan.name}.jsonl"
        self.start_s, self.start_cpu_s = time.monotonic(), time.process_time()
        self.loss: float | None = None

    def note(self, step: int, loss: float) -> None:
        self.loss = loss if self.loss is None else 0.98 * self.loss + 0.02 * loss
        if step % 50 == 0:
            self._write(step)

    def _write(self, step: int) -> None:
        wall_s, cpu_s = time.monotonic() - self.start_s, time.process_time() - self.start_cpu_s
        seconds = {"wall_s": round(wall_s), "cpu_s": round(cpu_s)}
        line = json.dumps({"step": step, "loss": round(self.loss, 4), **seconds})
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def train(worker: TrainingProcess, weights: TrainedWeights, loss_at: Callable[[int, Random], Tensor]) -> None:
    """Run the plan from where its checkpoint stands; leaves the averaged weights in the modules."""
    plan = weights.plan
    journal = TrainingLog(plan)
    for step in range(weights.resume(), plan.steps):
        seed = (plan.seed * 1_000_003 + step) * WORLD + worker.rank
        torch.manual_seed(seed)
        loss = loss_at(step, Random(seed))
        loss.backward()
        weights.update(worker, step)
        if worker.leads:
            journal.note(step + 1, loss.item())
        if worker.leads and (step + 1) % plan.save_every == 0:
            weights.save(step + 1)
    weights.swap()


def _enter(rank: int, stage: Callable, shared: Tensor, barrier: Any, options: tuple) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    stage(TrainingProcess(rank, shared, barrier), *options)


def launch(stage: Callable, *options: Any) -> None:
    """Run stage(worker, *options) in one process per core; raises when one of them fails."""
    os.environ["OMP_NUM_THREADS"] = "1"
    shared = torch.zeros(2, WORLD, MAX_PARAMETERS).share_memory_()
    barrier = mp.get_context("spawn").Barrier(WORLD)
    mp.spawn(_enter, args=(stage, shared, barrier, options), nprocs=WORLD)
