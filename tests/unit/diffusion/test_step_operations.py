"""Between the start of a batch and its decode nothing waits for the device, and its rows take a step together."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.step_operations import LIMIT, LIMITED, costs
from fanlight.contract.schedulers import SHORT_NAMES
from services.diffusion.engine.backend import TorchBackend
from services.diffusion.engine.generation import Start
from services.diffusion.engine.transfers import HostFlags
from services.diffusion.models.model_manager import ModelManager
from services.diffusion.models.scan import scan
from tests.fakes.dispatch import DispatchCount
from tests.fakes.families import make_tiny_sdxl
from tests.fakes.step_tables import without_tables

ROWS = 8


@pytest.fixture
def backend(manager):
    """One that has not learned from other tests how many rows fit in memory."""
    return TorchBackend(manager, threads=1)


@pytest.mark.parametrize("name", [name for name in SHORT_NAMES if name != "edm_euler"])
def test_a_step_of_eight_rows_waits_for_nothing_and_is_few_operations(name, asked, backend):
    rows = [backend.begin(asked(scheduler=name, steps=4, seed=seed, prompt=f"a cat {seed}")) for seed in range(ROWS)]
    steps = costs(backend, rows)
    assert [step.syncs for step in steps] == [0] * len(steps)
    # A Brownian path has some places of its own in each step.
    limit = 2 * LIMIT if name == "dpmpp_sde" else LIMIT
    assert max(step.operations for step in steps[1:]) <= limit
    assert set(LIMITED) <= set(SHORT_NAMES)


def test_a_row_that_joins_or_leaves_makes_the_batch_anew_without_waiting(asked, backend):
    first = [backend.begin(asked(scheduler="euler_a", steps=4, seed=seed)) for seed in range(3)]
    late = backend.begin(asked(scheduler="dpmpp_2m", steps=5, seed=9))
    with DispatchCount() as counted:
        backend.advance(first)
        backend.advance([*first, late])
        backend.advance([first[0], first[2], late])
    assert not counted.syncs


def test_inpainting_controls_and_changing_prompts_wait_for_nothing(asked, control, backend):
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (8, 8, 40, 40))
    start = Start(image=Image.new("RGB", (64, 64), "red"), strength=0.9, mask=mask)
    controls = (control("canny", end=0.7, mode="prompt"), control("depth", scale=0.5))
    row = backend.begin(
        asked(prompt="a [cat:dog:0.5] AND a tree :0.4", steps=5, start=start, controls=controls, prompt_syntax="a1111")
    )
    with DispatchCount() as counted:
        while not row.is_finished:
            assert backend.advance([row])[0].error is None
    assert not counted.syncs


def test_sdxl_waits_for_nothing_and_makes_what_a_request_adds_once(asked, tmp_path):
    own = TorchBackend(ModelManager(device="cpu"), threads=1)
    checkpoint = scan([make_tiny_sdxl(tmp_path / "xl")]).default()
    wanted = [replace(asked(scheduler="euler", steps=3, seed=seed), checkpoint=checkpoint) for seed in range(ROWS)]
    rows = [own.begin(each) for each in wanted]
    steps = costs(own, rows)
    assert sum(step.syncs for step in steps) == 0
    assert max(step.operations for step in steps[1:]) <= LIMIT


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc", "pndm", "dpmpp_sde"])
def test_a_row_keeps_its_numbers_whoever_joins_and_leaves(name, asked, backend):
    """What its scheduler remembers moves with it."""
    wanted = asked(scheduler=name, steps=5, seed=3)
    alone = backend.begin(wanted)
    while not alone.is_finished:
        backend.advance([alone])
    row = backend.begin(wanted)
    strangers = [backend.begin(asked(scheduler=other, steps=9, seed=8)) for other in ("unipc", "euler_a", "pndm")]
    for number in range(row.evaluations):
        backend.advance([*strangers[number % 3 :], row])
    assert torch.allclose(row.latents, alone.latents, atol=1e-4)


@pytest.mark.parametrize("name", ["ddim", "euler_a", "dpmpp_2m", "unipc", "lcm", "heun", "dpmpp_sde"])
def test_an_image_is_the_one_of_the_scheduler_itself(name, asked, backend, monkeypatch):
    mask = Image.new("L", (64, 64), 0)
    mask.paste(128, (8, 8, 40, 40))
    for start in (None, Start(image=Image.new("RGB", (64, 64), "red"), strength=0.75, mask=mask)):
        wanted = asked(scheduler=name, steps=4, start=start)
        fused = _pixels(backend, wanted)
        with monkeypatch.context() as patch:
            without_tables(patch)
            assert np.abs(_pixels(backend, wanted) - fused).max() <= 2


def _pixels(backend, wanted):
    row = backend.begin(wanted)
    while not row.is_finished:
        assert backend.advance([row])[0].error is None
    return backend.finish(row).pixels.astype(int)


def test_flags_on_the_host_are_read_at_once():
    flags = HostFlags()
    assert flags.read(is_last=False) is None
    flags.post(torch.tensor([True, False]))
    assert flags.read(is_last=False) == [True, False]
