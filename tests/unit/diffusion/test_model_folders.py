"""Folders in diffusers' layout: the pipelines whose parts are the usual ones, and configs that leave out defaults."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from transformers import CLIPTextConfig

from services.diffusion.models.config_defaults import whole_controlnet, whole_recipe, whole_vae
from services.diffusion.models.recipes import from_folder
from services.diffusion.models.scan import PIPELINE_CLASSES, scan
from services.diffusion.wire import models_to_proto
from tests.unit.diffusion.test_strange_folders import link_tree


def change(file, *, without=(), **values):
    before = {name: value for name, value in json.loads(file.read_text()).items() if name not in without}
    file.write_text(json.dumps({**before, **values}))


@pytest.mark.parametrize(
    "name",
    [
        "LatentConsistencyModelPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionControlNetInpaintPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
        "StableDiffusionPAGPipeline",
        "StableDiffusionPAGImg2ImgPipeline",
        "StableDiffusionPAGInpaintPipeline",
        "StableDiffusionControlNetPAGPipeline",
        "StableDiffusionXLPAGPipeline",
        "StableDiffusionXLControlNetPAGPipeline",
        "StableDiffusionPipelineSafe",
    ],
)
def test_pipelines_of_the_usual_parts_are_checkpoints(name, models, tmp_path):
    link_tree(models / "model", tmp_path / "pipe")
    change(tmp_path / "pipe" / "model_index.json", _class_name=name)
    found = scan([tmp_path])
    assert ([entry.id for entry in found.entries], found.left_out) == (["pipe"], ())


@pytest.mark.parametrize(
    "name",
    ["StableDiffusion3Pipeline", "FluxPipeline", "StableDiffusionUpscalePipeline", "StableDiffusionDepth2ImgPipeline",
     "StableDiffusionInstructPix2PixPipeline", "KandinskyPipeline", "StableDiffusionXLInstructPix2PixPipeline",
     "StableCascadeCombinedPipeline", "AnimateDiffPipeline", "IFPipeline", "", 3, None, ["custom", "Pipe"], {}],
    ids=str,
)  # fmt: skip
def test_others_are_left_out_with_their_class(name, models, tmp_path):
    link_tree(models / "model", tmp_path / "pipe")
    change(tmp_path / "pipe" / "model_index.json", _class_name=name)
    found = scan([tmp_path])
    assert found.entries == []
    [left_out] = found.left_out
    assert (left_out.path, left_out.reason) == ("pipe", f"{name} is not supported")


def test_every_class_that_is_taken_is_one_of_diffusers():
    import diffusers

    assert PIPELINE_CLASSES - set(dir(diffusers)) <= {"StableDiffusionControlNetPAGImg2ImgPipeline",
                                        "StableDiffusionXLControlNetPAGInpaintPipeline"}  # fmt: skip


def test_a_config_may_leave_out_what_diffusers_has_defaults_for(models, tmp_path, manager):
    """The tiny model differs from the defaults in widths alone: with the others left out it is the same."""
    link_tree(models / "model", tmp_path / "pipe")
    change(tmp_path / "pipe" / "unet" / "config.json", without=("in_channels", "out_channels", "flip_sin_to_cos"))
    change(tmp_path / "pipe" / "vae" / "config.json", without=("latent_channels", "in_channels", "out_channels"))
    change(tmp_path / "pipe" / "text_encoder" / "config.json", without=("max_position_embeddings", "hidden_act"))
    link_tree(models / "controlnet-canny", tmp_path / "controlnet-canny")
    change(tmp_path / "controlnet-canny" / "config.json", without=("in_channels", "global_pool_conditions"))
    found = scan([tmp_path])
    assert found.left_out == ()
    checkpoint, whole = found.default(), scan([models]).default()
    assert (checkpoint.shape, checkpoint.width_px) == (whole.shape, whole.width_px)
    [net] = manager.checkpoint(checkpoint, found.controlnets_of(checkpoint)).nets
    unet = manager.checkpoint(checkpoint).unet
    for own, other in zip(unet.parameters(), manager.checkpoint(whole).unet.parameters(), strict=True):
        assert torch.equal(own, other)
    assert net.config.in_channels == 4


def test_the_defaults_are_those_of_the_libraries(models):
    recipe = from_folder(models / "model")
    bare = whole_recipe(type(recipe)(index={}, unet={}, vae={}, texts=recipe.texts))
    with torch.device("meta"):
        unet = UNet2DConditionModel().config
        vae, net = AutoencoderKL().config, ControlNetModel().config
    for name, value in bare.unet.items():
        default = 64 if name == "sample_size" else unet[name]
        assert value == (list(default) if isinstance(default, tuple) else default), name
    for own, config in ((whole_vae({}), vae), (whole_controlnet({}), net)):
        for name, value in own.items():
            assert value == (list(config[name]) if isinstance(config[name], tuple) else config[name]), name
    sdxl = whole_recipe(type(recipe)(index={}, unet={"addition_embed_type": "text_time"}, vae={}, texts=()))
    assert (sdxl.vae["force_upcast"], "force_upcast" in bare.vae) == (vae["force_upcast"], False)
    text = type(recipe.texts[0])(part="text_encoder", tokenizer="tokenizer", config={})
    whole = whole_recipe(type(recipe)(index={}, unet={}, vae={}, texts=(text,)))
    assert whole.texts[0].config["hidden_size"] == CLIPTextConfig().hidden_size


@pytest.mark.parametrize("value", [None, 64, [64, 64]])
def test_a_sample_size_may_be_missing(value, models, tmp_path):
    link_tree(models / "model", tmp_path / "pipe")
    change(tmp_path / "pipe" / "unet" / "config.json", sample_size=value)
    entry = scan([tmp_path]).default()
    assert (entry.width_px, entry.height_px) == (64 * 4, 64 * 4)


STRANGE = (None, True, -1, 3.5, "text", [], {}, [[1]], {"a": [1]}, 10**30)


@pytest.mark.parametrize("value", STRANGE, ids=str)
@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("pipe/model_index.json", "unet"),
        ("pipe/unet/config.json", "cross_attention_dim"),
        ("pipe/unet/config.json", "sample_size"),
        ("pipe/vae/config.json", "block_out_channels"),
        ("pipe/text_encoder/config.json", "hidden_size"),
        ("controlnet-canny/config.json", "_class_name"),
        ("controlnet-canny/config.json", "conditioning_embedding_out_channels"),
        ("config.json", "_class_name"),
        ("config.json", "architectures"),
    ],
)
def test_wrong_types_leave_that_folder_out_alone(value, file, key, models, tmp_path):
    for name in ("pipe", "good"):
        link_tree(models / "model", tmp_path / name)
    link_tree(models / "controlnet-canny", tmp_path / "controlnet-canny")
    path = tmp_path / file
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), key: value}))
    found = scan([tmp_path])
    models_to_proto(found)
    assert "good" in [entry.id for entry in found.entries]
    folder = file.rpartition("/")[0].partition("/")[0] or tmp_path.name
    assert all(each.path.startswith(folder) for each in found.left_out)
