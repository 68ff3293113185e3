"""Files and folders as people have them: what only has a model's name, caches, and what vanishes."""

import os

import pytest
import torch
from safetensors.torch import save_file

from fanlight.contract.names import find_name
from fanlight.diffusion.v1.diffusion_pb2 import GenerateRequest
from services.diffusion.models import scan as scanning
from services.diffusion.models.embeddings import read_embedding
from services.diffusion.models.faults import UnusableModel
from services.diffusion.models.lora_files import read_lora
from services.diffusion.models.scan import scan
from services.diffusion.parse.parser import Parser
from services.kernel.images import ImageLimits
from tests.fakes.checkpoint_files import ldm, without, write_header
from tests.fakes.sparse_files import sparse_file
from tests.unit.diffusion.conftest import ABILITIES
from tests.unit.diffusion.test_strange_folders import link_tree
from tests.unit.diffusion.test_unique_ids import CHECKPOINT, EMBEDDING, LORA, VAE, ids

REVISION = "0123456789abcdef0123456789abcdef01234567"


def reasons(folder):
    return {each.path: each.reason for each in scan([folder]).left_out}


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"<HTML><body>", "web page"),
        (b'{"error": "Unauthorized"}', "error of a download"),
        (b"PK\x03\x04" + bytes(99), "pickle"),
        (b"\x80\x02}q\x00" + bytes(99), "pickle"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
    ],
)
def test_what_only_has_a_models_name_is_called_what_it_is(content, word, models, tmp_path):
    (tmp_path / "dream.safetensors").write_bytes(content)
    link_tree(models / "model", tmp_path / "pipe")
    [weights] = (tmp_path / "pipe" / "unet").glob("*.safetensors")
    weights.unlink()
    weights.write_bytes(content)
    found = reasons(tmp_path)
    assert found.keys() == {"dream.safetensors", "pipe"}
    assert all(word in reason for reason in found.values())
    assert found["pipe"].startswith("its unet cannot be used")


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    sparse_file(tmp_path / "dream.safetensors", CHECKPOINT)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("services.diffusion.models.headers.open_ordinary", refuse)
    assert reasons(tmp_path) == {"dream.safetensors": "dream.safetensors cannot be read: Permission denied"}


TINY = {"decoder.layers.0.weight": (64, 16, 3, 3), "decoder.layers.2.conv.0.weight": (64, 64, 3, 3)}
FLUX = {"decoder.conv_in.weight": (8, 16, 3, 3), "decoder.up.0.block.0.conv1.weight": (1,)}


@pytest.mark.parametrize(
    ("shapes", "word"),
    [
        (FLUX, "Flux"),
        ({f"first_stage_model.{name}": shape for name, shape in FLUX.items()}, "Flux"),
        (TINY, "Flux"),
        ({"decoder.conv_in.weight": (8, 16, 3, 3, 3), "decoder.up.0.block.0.conv1.conv.weight": (1,)}, "videos"),
        ({**VAE, "quantize.embedding.weight": (9, 4)}, "VQGAN"),
    ],
)
def test_vaes_of_other_families_are_left_out_by_name(shapes, word, tmp_path):
    sparse_file(tmp_path / "ae.safetensors", shapes)
    sparse_file(tmp_path / "folder" / "diffusion_pytorch_model.safetensors", shapes)
    (tmp_path / "folder" / "config.json").write_text(
        '{"_class_name": "AutoencoderKL", "latent_channels": 16, "block_out_channels": [1, 2, 3, 4]}'
    )
    found = reasons(tmp_path)
    assert ids(tmp_path) == []
    assert word in found["ae.safetensors"]
    assert len(found) == 2


def test_a_vae_of_videos_with_layers_of_its_own_is_named(tmp_path):
    shapes = {"decoder.conv1.weight": (8, 16, 3, 3, 3), "encoder.conv1.weight": (8, 3, 3, 3, 3)}
    sparse_file(tmp_path / "wan.safetensors", shapes)
    assert "videos" in reasons(tmp_path)["wan.safetensors"]


def test_a_lora_in_whole_numbers_is_left_out(tmp_path):
    write_header(tmp_path / "ink.safetensors", {name: ("I8", shape) for name, shape in LORA.items()})
    assert "whole numbers" in reasons(tmp_path)["ink.safetensors"]


def hub_cache(folder, repository, name, shapes):
    """A file as the hub's client has it: a link to a blob."""
    blob = folder / f"models--{repository}" / "blobs" / REVISION
    sparse_file(blob, shapes)
    link = folder / f"models--{repository}" / "snapshots" / REVISION / name
    link.parent.mkdir(parents=True)
    link.symlink_to(os.path.relpath(blob, link.parent))


def test_the_hubs_cache_is_searched_without_its_blobs(tmp_path):
    large = {**CHECKPOINT, "model.diffusion_model.out.2.weight": (1024, 1024)}
    hub_cache(tmp_path, "org--dream", "dream.safetensors", large)
    hub_cache(tmp_path, "org--ink", "pytorch_lora_weights.safetensors", LORA)
    assert (ids(tmp_path), reasons(tmp_path)) == (["dream", "ink"], {})


def test_the_steps_of_a_training_are_told_apart_by_their_files(tmp_path):
    for name in ("learned_embeds", "learned_embeds-steps-500"):
        sparse_file(tmp_path / "mint" / f"{name}.safetensors", EMBEDDING)
    assert ids(tmp_path) == ["mint.learned_embeds", "mint.learned_embeds-steps-500"]


def test_numbered_controlnets_of_a_pipeline_are_called_by_it(models, tmp_path):
    link_tree(models / "model", tmp_path / "pipe")
    for name in ("controlnet", "controlnet_1"):
        link_tree(models / "controlnet-canny", tmp_path / "pipe" / name)
    assert ids(tmp_path) == ["pipe", "pipe.controlnet", "pipe.controlnet_1"]


def test_a_name_that_stands_for_any_model_is_left_out(tmp_path):
    sparse_file(tmp_path / "*.safetensors", LORA)
    assert "rename it" in reasons(tmp_path)["*.safetensors"]


def test_letters_with_marks_are_found_as_they_are_typed():
    assert find_name({"cafe\u0301": ()}, "caf\u00e9.safetensors") == "cafe\u0301"
    assert find_name({"caf\u00e9": ()}, "CAFE\u0301") == "caf\u00e9"


def test_a_file_that_vanishes_during_the_search_ends_nothing(tmp_path, monkeypatch):
    sparse_file(tmp_path / "dream.safetensors", CHECKPOINT)
    sparse_file(tmp_path / "ink.safetensors", LORA)
    read = scanning.read_file

    def read_and_remove(path):
        entry = read(path)
        if path.name == "ink.safetensors":
            path.unlink()
        return entry

    monkeypatch.setattr(scanning, "read_file", read_and_remove)
    found = scan([tmp_path])
    assert [entry.id for entry in found.entries] == ["dream"]
    assert [(each.path, each.reason[:17]) for each in found.left_out] == [("ink.safetensors", "it cannot be read")]


@pytest.mark.parametrize("change", [os.unlink, lambda path: path.write_bytes(b""), lambda path: os.truncate(path, 9)])
def test_a_file_that_vanishes_before_it_is_used_is_not_the_nodes_fault(change, tmp_path):
    save_file({"emb_params": torch.ones(2, 768)}, tmp_path / "mint.safetensors")
    torch.save({"*": torch.ones(2, 768)}, tmp_path / "lime.pt")
    save_file({name: torch.ones(shape) for name, shape in LORA.items()}, tmp_path / "ink.safetensors")
    mint, lime, ink = (scanning.read_path(tmp_path / n) for n in ("mint.safetensors", "lime.pt", "ink.safetensors"))
    for entry, read in ((mint, read_embedding), (lime, read_embedding), (ink, read_lora)):
        change(entry.path)
        with pytest.raises(UnusableModel, match=entry.id):
            read(entry)


ODD = {
    "a_without_vae": without(CHECKPOINT, "first_stage_model."),
    "b_refiner": {name: tuple(each.shape) for name, each in ldm(384, 1280).items()},
    "c_inpainting": {name: tuple(each.shape) for name, each in ldm(320, 768, 9).items()},
}


def test_the_default_checkpoint_needs_a_prompt_alone(tmp_path):
    for name, shapes in {**ODD, "d_whole": CHECKPOINT}.items():
        sparse_file(tmp_path / f"{name}.safetensors", shapes)
    assert scan([tmp_path]).default().id == "d_whole"
    assert scan([tmp_path], default_id="b_refiner").default().id == "b_refiner"
    (tmp_path / "d_whole.safetensors").unlink()
    assert scan([tmp_path]).default().id == "a_without_vae"


READ = "and was read as plain words"


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        (
            "a cat, Ugly",
            ["ugly is the name of several embeddings, and was read as plain words: write a.ugly or b.ugly"],
        ),
        ("a cat, a.ugly", []),
        ("an uglyness", []),
    ],
)
def test_a_word_that_several_embeddings_share_is_a_warning(prompt, told, tmp_path):
    sparse_file(tmp_path / "dream.safetensors", CHECKPOINT)
    for folder in ("a", "b"):
        sparse_file(tmp_path / "embeddings" / folder / "ugly.safetensors", EMBEDDING)
    parser = Parser(
        catalog=scan([tmp_path]), abilities=ABILITIES, picture_limits=ImageLimits(), random_seed=lambda: 42
    )  # fmt: skip
    request = GenerateRequest(prompt="a cat", negative_prompt=prompt, width_px=64, height_px=64)
    assert list(parser.parse(request).warnings) == told
