"""Damaged and unfit files are typed errors, and the next request works."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fanlight.errors import FailedPrecondition, NodeFault
from services.diffusion.models.faults import UnusableModel
from services.diffusion.models.model_manager import ModelManager
from services.diffusion.models.scan import scan


@pytest.fixture
def copied(models, tmp_path):
    """A copy of the tiny model to damage."""
    return shutil.copytree(models, tmp_path / "copied")


@pytest.fixture
def load(copied):
    return lambda: ModelManager(device="cpu").checkpoint(scan([copied]).default())


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("damage", [lambda data: data[:1000], lambda data: b"\xff" * 64 + data[64:], lambda data: b""])
def test_damaged_weights_are_a_typed_error(part, damage, copied):
    """Damaged since the folder was searched, which finds some of it."""
    checkpoint = scan([copied]).default()
    [file] = (copied / "model" / part).glob("*.safetensors")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UnusableModel, match=f"copied/{part} cannot be loaded"):
        ModelManager(device="cpu").checkpoint(checkpoint)


def test_weights_that_lack_a_tensor_are_a_typed_error(copied, load):
    file = copied / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop("conv_in.weight")
    save_file(tensors, file)
    with pytest.raises(UnusableModel, match="unet"):
        load()


def test_weights_of_another_shape_are_a_typed_error(copied, load):
    file = copied / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_in.weight"] = tensors["decoder.conv_in.weight"][:2].clone()
    save_file(tensors, file)
    with pytest.raises(UnusableModel, match="vae"):
        load()


def test_a_damaged_tokenizer_is_a_typed_error(copied, load):
    (copied / "model" / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(UnusableModel, match="cannot be loaded"):
        load()


@pytest.mark.parametrize("merge", [["a", "nothing"], ["nothing", "a"], ["!", "a"]])
def test_a_tokenizer_with_a_merge_of_no_tokens_is_a_typed_error(merge, copied, load):
    file = copied / "model" / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"].append(merge)
    file.write_text(json.dumps(content))
    with pytest.raises(UnusableModel, match="tokenizer cannot be loaded"):
        load()


@pytest.mark.parametrize("file", ["unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_a_checkpoint_with_a_damaged_config_is_not_offered(file, copied):
    (copied / "model" / file).write_text("{")
    assert not scan([copied]).checkpoints


def test_a_pickle_is_not_opened(copied):
    entry = scan([copied]).default()
    file = copied / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(FailedPrecondition, match="pickles"):
        ModelManager(device="cpu").checkpoint(entry)
    assert "pickles" in scan([copied]).left_out[0].reason


def test_half_precision_files_are_found_and_widened(copied, load):
    for file in (copied / "model").rglob("*.safetensors"):
        halves = {name: tensor.half() for name, tensor in load_file(file).items()}
        save_file(halves, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        file.unlink()
    checkpoint = load()
    assert {checkpoint.unet.dtype, checkpoint.vae.dtype, next(checkpoint.texts[0].encoder.parameters()).dtype} == {
        torch.float32
    }


def test_files_as_older_programs_wrote_them_load_to_the_same_weights(copied, load):
    """`text_model.` before the text encoder's names, other names in the VAE's attention, no tokenizer.json."""
    before = load()
    _rename(copied / "model" / "text_encoder", lambda name: f"text_model.{name}")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    _rename(copied / "model" / "vae", lambda name: _replaced(name, old))
    (copied / "model" / "tokenizer" / "tokenizer.json").unlink()
    after = load()
    for part in (lambda checkpoint: checkpoint.texts[0].encoder, lambda checkpoint: checkpoint.vae):
        one, other = (part(checkpoint).state_dict() for checkpoint in (before, after))
        assert all(torch.equal(one[name], other[name]) for name in one)
    one, other = (checkpoint.texts[0].tokenizer.ids("A cat!") for checkpoint in (before, after))
    assert one == other


def _rename(folder, rename):
    [file] = folder.glob("*.safetensors")
    renamed = {rename(name): tensor for name, tensor in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})


def _replaced(name, words):
    for new, old in words.items():
        name = name.replace(new, old)
    return name


def test_after_a_failed_load_the_next_one_tries_again(copied):
    manager, entry = ModelManager(device="cpu"), scan([copied]).default()
    [weights] = (copied / "model" / "unet").glob("*.safetensors")
    saved = weights.read_bytes()
    weights.write_bytes(saved[:-1])
    with pytest.raises(UnusableModel):
        manager.checkpoint(entry)
    weights.write_bytes(saved)
    assert manager.checkpoint(entry).entry == entry
    assert manager.cached == {entry}
    assert manager.device_name == "cpu"


def test_a_device_that_is_not_there_is_a_typed_error(catalog):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(NodeFault, match="cuda:3") as caught:
        ModelManager(device="cuda:3").checkpoint(catalog.default())
    assert caught.value.part == "device:cuda:3"
