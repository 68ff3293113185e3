"""A training run that was interrupted ends where an undisturbed one ends."""

from random import Random

import pytest
import torch
from torch import Tensor, nn

from training import parallel
from training.parallel import TrainedWeights, TrainingPlan, train


class Alone:
    """The only process of its group."""

    rank = 0
    leads = True

    def mean(self, gradient: Tensor, step: int) -> None:
        """Its own gradient is the mean."""


class Killed(Exception):
    pass


class Run:
    """A little model, which is killed before the step `dies_at`."""

    def __init__(self, dies_at: int | None = None) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1)
        self.dies_at = dies_at
        self.steps: list[int] = []

    def loss(self, step: int, rng: Random) -> Tensor:
        if step == self.dies_at:
            raise Killed
        self.steps.append(step)
        return (self.model(torch.randn(4, 3)) - rng.random()).square().mean()

    def go(self) -> list[float]:
        plan = TrainingPlan(name="little", steps=6, batch=4, learning_rate=0.1, seed=3, save_every=2)
        train(Alone(), TrainedWeights([self.model], plan), self.loss)
        return [value for parameter in self.model.parameters() for value in parameter.detach().flatten().tolist()]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where checkpoints and the journal go."""
    monkeypatch.setattr(parallel, "OUT", tmp_path)
    return tmp_path


def test_a_run_that_was_killed_goes_on_from_its_checkpoint_to_the_same_weights(folder, monkeypatch):
    with pytest.raises(Killed):
        Run(dies_at=3).go()
    rest = Run()
    resumed = rest.go()
    assert rest.steps == [2, 3, 4, 5]
    monkeypatch.setattr(parallel, "OUT", folder / "another")
    assert Run().go() == resumed


def test_a_finished_run_trains_no_further():
    first = Run().go()
    again = Run()
    assert again.go() == first
    assert again.steps == []


def test_the_rate_warms_up_then_falls_to_a_fiftieth():
    plan = TrainingPlan(name="little", steps=1000, batch=1, learning_rate=1.0, seed=0)
    rates = [plan.rate(step) for step in range(1000)]
    assert rates[0] < 0.1
    assert max(rates) == rates[20]
    assert rates[-1] == pytest.approx(0.02, abs=1e-3)
