"""An evaluation that one image of a batch makes fail is done again for the others, with the very same numbers."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fanlight.errors import FanlightError, InvalidField
from services.diffusion.engine.backend import TorchBackend
from services.diffusion.engine.generation import Generation
from services.diffusion.models.entries import LoraUse
from services.diffusion.models.scan import read_path, starter_folder
from tests.fakes.step_tables import without_tables

SEEDS = (1, 2, 3)
POISONED = 1


def raising(error: Exception):
    def fail(*_, **__):
        raise error

    return fail


def break_scaling(row) -> None:
    row.sampler.scheduler.scale_model_input = raising(IndexError("index 21 is out of bounds"))


def break_prompt(row) -> None:
    ((((end, prompt),), weight),) = row.conditioning.prompts
    broken = replace(prompt, embeds=torch.cat([prompt.embeds, prompt.embeds], dim=-1))
    row.conditioning = replace(row.conditioning, prompts=((((end, broken),), weight),))


def break_control(row) -> None:
    row.controls[0].condition = row.controls[0].condition[..., :3]


def batch(backend: TorchBackend, generations, breaks=None) -> list:
    """Latents after two steps, or the error, of each row."""
    rows = [backend.begin(generation) for generation in generations]
    if breaks:
        breaks(rows[POISONED])
    ends: list = [None] * len(rows)
    for _ in range(2):
        running = [number for number, end in enumerate(ends) if end is None]
        for number, result in zip(running, backend.advance([rows[number] for number in running]), strict=True):
            ends[number] = result.error
    return [row.latents if end is None else end for row, end in zip(rows, ends, strict=True)]


@pytest.mark.parametrize(
    ("breaks", "part"),
    [
        (break_scaling, ""),
        (break_prompt, "checkpoint:tiny"),
        (break_control, "controlnet:canny"),
    ],
)
def test_the_others_get_the_numbers_that_they_get_without_it(breaks, part, asked, control, backend, monkeypatch):
    if breaks is break_scaling:
        without_tables(monkeypatch)
    generations = [asked(seed=seed, prompt=f"a cat {seed}", controls=(control("canny"),)) for seed in SEEDS]
    alone = batch(backend, [each for number, each in enumerate(generations) if number != POISONED])
    ends = batch(backend, generations, breaks)
    failed = ends.pop(POISONED)
    assert isinstance(failed, FanlightError)
    assert failed.part == part
    assert isinstance(failed, InvalidField) == (part == "")
    for latents, expected in zip(ends, alone, strict=True):
        assert torch.equal(latents, expected)


def test_images_of_a_batch_that_all_fail_end_each_with_its_own_error(asked, control, backend):
    generations = [asked(seed=seed, controls=(control("canny"),)) for seed in SEEDS]
    rows = [backend.begin(generation) for generation in generations]
    for row in rows:
        break_control(row)
    errors = [result.error for result in backend.advance(rows)]
    assert [error.part for error in errors] == ["controlnet:canny"] * 3
    assert len({id(error) for error in errors}) == 3


def test_an_image_with_the_new_file_of_a_lora_shares_no_weights_with_one_that_has_the_old(tmp_path: Path, manager):
    starter = read_path(starter_folder() / "model")
    file = tmp_path / "style.safetensors"
    shutil.copy(starter_folder() / "lora-cyanotype" / "pytorch_lora_weights.safetensors", file)
    backend = TorchBackend(manager, threads=1)
    old = backend.begin(_styled(starter, file, seed=1))
    _double(file)
    new = backend.begin(_styled(starter, file, seed=1))
    assert old.checkpoint.unet is not new.checkpoint.unet
    backend.advance([old, new])
    fresh = backend.begin(_styled(starter, file, seed=1))
    backend.advance([fresh])
    assert torch.allclose(new.latents, fresh.latents, atol=1e-5)
    assert not torch.allclose(old.latents, new.latents, atol=1e-3)


def _styled(checkpoint, file: Path, *, seed: int):
    return Generation(
        checkpoint=checkpoint,
        prompt="a cup",
        width_px=64,
        height_px=64,
        steps=4,
        scheduler="ddim",
        seed=seed,
        loras=(LoraUse(entry=read_path(file)),),
    )


def _double(file: Path) -> None:
    tensors = {name: tensor * 2 for name, tensor in load_file(file).items()}
    fresh = file.with_suffix(".new")
    save_file(tensors, fresh)
    fresh.rename(file)
