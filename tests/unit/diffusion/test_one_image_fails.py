"""An image that fails in a batch ends alone, names what failed, and changes nothing in the others."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fanlight.errors import FanlightError, InvalidField
from services.diffusion.engine.backend import TorchBackend
from services.diffusion.engine.generation import ControlInput, Generation
from services.diffusion.models.catalog import ModelCatalog
from services.diffusion.models.entries import LoraUse
from services.diffusion.models.faults import UnusableModel
from services.diffusion.models.model_manager import ModelManager
from services.diffusion.models.scan import scan

# Of a channel's value: batches of another size round in another order.
BYTES_LIMIT = 1


def generated(backend: TorchBackend, generations: Sequence[Generation]) -> list[Any]:
    """Pixels (H, W, 3) or the error of each, all in one batch from the first evaluation on."""
    results: list[Any] = [None] * len(generations)
    running: dict[int, Any] = {}
    for number, generation in enumerate(generations):
        try:
            running[number] = backend.begin(generation)
        except FanlightError as error:
            results[number] = error
    while running:
        numbers = list(running)
        for number, step in zip(numbers, backend.advance([running[each] for each in numbers]), strict=True):
            if step.error is not None:
                results[number] = step.error
                del running[number]
            elif step.is_finished:
                results[number] = backend.finish(running.pop(number)).pixels.astype(int)
    return results


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    shutil.copytree(models, tmp_path / "models")
    return tmp_path / "models"


@pytest.fixture
def backend() -> TorchBackend:
    return TorchBackend(ModelManager(device="cpu"), threads=1)


def wanted(catalog: ModelCatalog, **fields: Any) -> Generation:
    checkpoint = fields.pop("checkpoint", None) or catalog.default()
    known = {"prompt": "a cat", "width_px": 64, "height_px": 64, "steps": 4, "scheduler": "ddim", "seed": 7}
    return Generation(checkpoint=checkpoint, **{**known, **fields})


def assert_ends_alone(
    backend: TorchBackend, bad: Generation, strangers: Sequence[Generation], part: str
) -> FanlightError:
    """The strangers' images are those that they are without the bad one."""
    alone = generated(backend, strangers)
    first, error, *others = generated(backend, [strangers[0], bad, *strangers[1:]])
    for one, other in zip(alone, [first, *others], strict=True):
        assert np.abs(one - other).max() <= BYTES_LIMIT
    assert isinstance(error, FanlightError)
    assert error.part == part
    return error


def test_a_scheduler_that_fails_for_its_parameters_is_the_requests_fault(folder: Path, backend: TorchBackend) -> None:
    config = folder / "model" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "beta_schedule": "squaredcos_cap_v2"}))
    catalog = scan([folder])
    bad = wanted(catalog, scheduler="dpmpp_2m", noise_schedule="karras", steps=20, seed=9)
    strangers = [wanted(catalog, seed=1), wanted(catalog, seed=2, scheduler="euler")]
    error = assert_ends_alone(backend, bad, strangers, "")
    assert isinstance(error, InvalidField)
    assert error.field == "scheduler"


def test_a_scheduler_that_raises_in_a_later_step_ends_its_image_alone(
    folder: Path, backend: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.diffusion.engine import sampler as rows

    made = rows.make_scheduler

    def fragile(name: str, *arguments: Any, **options: Any) -> Any:
        scheduler = made(name, *arguments, **options)
        if name == "euler":
            scheduler.scale_model_input = lambda *_: torch.zeros(())[3]
        return scheduler

    monkeypatch.setattr(rows, "make_scheduler", fragile)
    monkeypatch.setattr(rows, "_TABLES", rows._Tables())
    catalog = scan([folder])
    error = assert_ends_alone(backend, wanted(catalog, scheduler="euler"), [wanted(catalog, seed=1)], "")
    assert error.field == "scheduler"


def control(catalog: ModelCatalog, name: str) -> ControlInput:
    from PIL import Image

    entry = catalog.controlnet(name, catalog.default())
    return ControlInput(controlnet=entry, image=Image.new("RGB", (64, 64), "gray"))


def change(file: Path, edit: Any) -> None:
    """`edit` gets the file's tensors by name, of any shapes."""
    tensors = load_file(file)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def test_numbers_that_are_not_finite_name_the_controlnet_that_has_them(folder: Path, backend: TorchBackend) -> None:
    file = folder / "controlnet-canny" / "diffusion_pytorch_model.safetensors"
    change(file, lambda tensors: tensors["conv_in.bias"].fill_(torch.nan))
    catalog = scan([folder])
    bad = wanted(catalog, controls=(control(catalog, "depth"), control(catalog, "canny")))
    strangers = [replace(bad, controls=(control(catalog, "depth"),), seed=3)]
    # Not one batch in the engine, but whoever is blamed must be the one.
    [error] = generated(backend, [bad])
    assert error.part == "controlnet:canny"
    assert isinstance(generated(backend, strangers)[0], np.ndarray)


def test_a_controlnet_that_fails_in_the_middle_is_named(
    folder: Path, backend: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.diffusion.engine import unet_step

    catalog = scan([folder])
    one_net = unet_step._one_net

    def short(which: int, controls: Any, scales: Any, inputs: Any) -> Any:
        residuals = one_net(which, controls, scales, inputs)
        return residuals if controls[0].entry.id == "depth" else residuals._replace(down=residuals.down[:-1])

    monkeypatch.setattr(unet_step, "_one_net", short)
    bad = wanted(catalog, controls=(control(catalog, "depth"), control(catalog, "canny")))
    [error] = generated(backend, [bad])
    assert error.part == "controlnet:canny"


@pytest.mark.parametrize("value", [torch.nan, 1e38])
def test_a_lora_that_makes_numbers_not_finite_is_named(folder: Path, backend: TorchBackend, value: float) -> None:
    (folder / "loras").mkdir()
    layer = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{layer}.lora_down.weight": torch.full((1, 16), value), f"{layer}.lora_up.weight": torch.zeros(1, 1)}
    catalog = scan([folder])
    text = backend._models.checkpoint(catalog.default()).texts[0].encoder
    width = text.encoder.layers[0].mlp.fc1.weight.shape[0]
    tensors[f"{layer}.lora_up.weight"] = torch.full((width, 1), value)
    save_file(tensors, folder / "loras" / "loud.safetensors")
    catalog = scan([folder])
    use = LoraUse(entry=catalog.lora("loud", catalog.default()), unet_weight=1.0, text_weight=1.0)
    assert_ends_alone(backend, wanted(catalog, loras=(use,)), [wanted(catalog, seed=1)], "lora:loud")


def embedding_files() -> dict[str, Any]:
    return {
        "empty": {"string_to_param": {}},
        "two": {"string_to_param": {"*": torch.zeros(1, 16), "+": torch.zeros(1, 16)}},
        "list": {"string_to_param": [torch.zeros(1, 16)]},
        "text": {"string_to_param": {"*": "nothing"}},
        "nan": {"string_to_param": {"*": torch.full((1, 16), torch.nan)}},
        "long": {"string_to_param": {"*": torch.zeros(200, 16)}},
        "wide": {"string_to_param": {"*": torch.zeros(1, 17)}},
        "a list": [torch.zeros(1, 16)],
        "a number": 3,
    }


# What only its values show.
LISTED = ("nan", "long", "wide")


@pytest.mark.parametrize("name", embedding_files())
def test_an_embedding_that_is_none_ends_its_image_and_is_named(folder: Path, backend: TorchBackend, name: str) -> None:
    """Replaced since the folder was searched: a file that is none then is never listed."""
    (folder / "embeddings").mkdir()
    file = folder / "embeddings" / "odd.pt"
    torch.save({"string_to_param": {"*": torch.zeros(1, 16)}}, file)
    catalog = scan([folder])
    entry = catalog.embedding("odd", catalog.default())
    torch.save(embedding_files()[name], file)
    bad = wanted(catalog, prompt="a cat, odd", embeddings=(entry,))
    error = assert_ends_alone(backend, bad, [wanted(catalog, seed=1)], "embedding:odd")
    assert isinstance(error, UnusableModel)


@pytest.mark.parametrize("name", [each for each in embedding_files() if each not in LISTED])
def test_a_file_that_is_no_embedding_is_left_out_with_the_reason(folder: Path, name: str) -> None:
    (folder / "embeddings").mkdir()
    torch.save(embedding_files()[name], folder / "embeddings" / "odd.pt")
    assert [each.path for each in scan([folder]).left_out if each.reason] == ["embeddings/odd.pt"]


def test_a_file_that_is_replaced_by_a_damaged_one_while_in_use_is_named(folder: Path, backend: TorchBackend) -> None:
    catalog = scan([folder])
    bad = wanted(catalog, controls=(control(catalog, "canny"),))
    assert isinstance(generated(backend, [bad])[0], np.ndarray)
    file = folder / "controlnet-canny" / "diffusion_pytorch_model.safetensors"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[:-7])
    [error] = generated(backend, [bad])
    assert (type(error), error.part) == (UnusableModel, "controlnet:canny")
    assert isinstance(generated(backend, [wanted(catalog)])[0], np.ndarray)


def test_tokens_beyond_the_table_are_refused_before_a_device_reads_beyond_it(
    folder: Path, backend: TorchBackend
) -> None:
    file = folder / "model" / "tokenizer" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "pad_token": "<|beyond|>"}))
    catalog = scan([folder])
    [error] = generated(backend, [wanted(catalog)])
    assert error.part == "checkpoint:models"
