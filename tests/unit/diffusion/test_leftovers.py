"""What a checkpoint's file lacks keeps it out by name, or is told; what it has beyond its parts too."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import FailedPrecondition
from services.diffusion.engine.backend import TorchBackend
from services.diffusion.models.faults import UnusableModel
from services.diffusion.models.ldm_names import text_names, unet_names, vae_names
from services.diffusion.models.model_manager import ModelManager
from services.diffusion.models.recipes import UnfitFolder, shipped
from services.diffusion.models.scan import scan
from services.diffusion.models.single_files import read_file
from services.diffusion.parse.parser import Parser
from services.kernel.images import ImageLimits
from tests.fakes.checkpoint_files import TEXT_HEADS, as_rows, ldm, whole_names, whole_shapes, without, write_header
from tests.fakes.ldm_files import write_ldm_file
from tests.unit.diffusion.conftest import ABILITIES

SD1, SD2, SDXL, REFINER = (320, 768), (320, 1024), (320, 2048), (384, 1280)
UNET, VAE = "model.diffusion_model.", "first_stage_model."


def read(tmp_path, tensors, **more):
    return read_file(write_header(tmp_path / "model.safetensors", {**as_rows(tensors), **more}))


@pytest.mark.parametrize("base", TEXT_HEADS)
def test_the_names_are_those_of_diffusers_modules(base):
    recipe = shipped(base)
    own = {f"{UNET}{name}" for name in unet_names(recipe.unet)}
    own |= {f"{VAE}{name}" for half in (True, False) for name in vae_names(recipe.vae, is_encoder=half)}
    assert own == set(whole_shapes(base))


@pytest.mark.parametrize("base", TEXT_HEADS)
def test_of_the_text_encoders_every_name_becomes_a_parameter(base):
    from services.diffusion.models.clip import ClipText
    from services.diffusion.models.loading import _conversions, build_empty, text_tensors

    for text, (head, is_open) in zip(shipped(base).texts, TEXT_HEADS[base], strict=True):
        with build_empty():
            model = ClipText.from_config(text.config)
        width = text.config["hidden_size"]
        found = {f"{head}{name}": torch.zeros(3 * width, 1) for name in text_names(text, is_open_clip=is_open)}
        bare = {name.removeprefix(head): each for name, each in found.items()}
        converted = _conversions().convert_open_clip_checkpoint(model, found, prefix=head) if is_open else bare
        expected = {name for name, _ in model.named_parameters()}
        assert set(text_tensors(converted)) - {"text_projection.weight"} == expected - {"text_projection.weight"}


@pytest.mark.parametrize("shapes", [SD1, SD2, SDXL, REFINER])
def test_a_whole_file_has_nothing_to_tell(shapes, tmp_path):
    entry = read(tmp_path, ldm(*shapes))
    assert (entry.recipe.has_vae, entry.note) == (True, "")


@pytest.mark.parametrize(
    ("shapes", "lacking", "why"),
    [
        (SD1, ("cond_stage_model.",), "no text_encoder"),
        (SD2, ("cond_stage_model.",), "no text_encoder"),
        (SDXL, ("conditioner.",), "no text_encoder"),
        (SDXL, ("conditioner.embedders.0.",), "no text_encoder"),
        (SDXL, ("conditioner.embedders.1.",), "no text_encoder_2"),
        (SD1, ("cond_stage_model.transformer.text_model.encoder.layers.11.",), "text_encoder lacks 16 of 196"),
        (SDXL, ("conditioner.embedders.1.model.text_projection",), "text_encoder_2 lacks 1 of .*text_projection"),
        (SD1, (f"{UNET}output_blocks.11.",), "UNet lacks .* of 686 tensors.*output_blocks.11"),
        # As in SSD-1B.
        (SDXL, (f"{UNET}middle_block.1.",), "UNet lacks .*smaller model"),
        (SDXL, (f"{UNET}label_emb.",), "UNet lacks 4 of 1680"),
        (SD1, (f"{VAE}decoder.mid.",), "VAE's decoder lacks"),
        (SD1, (f"{VAE}encoder.down.3.",), "VAE's encoder lacks"),
        (SD1, (f"{VAE}post_quant_conv.",), "VAE's decoder lacks 2"),
    ],
)
def test_what_a_file_lacks_keeps_it_out_by_name(shapes, lacking, why, tmp_path):
    with pytest.raises(UnfitFolder, match=why):
        read(tmp_path, without(ldm(*shapes), *lacking))


def test_a_file_without_a_vae_is_listed_with_what_it_needs(tmp_path):
    entry = read(tmp_path, without(ldm(*SD1), VAE))
    assert not entry.recipe.has_vae
    assert entry.note == "it has no VAE, so requests must name one"


def test_an_encoder_of_images_is_not_needed(tmp_path):
    entry = read(tmp_path, without(ldm(*SD1), f"{VAE}encoder.", f"{VAE}quant_conv."))
    assert entry.note == ""


@pytest.mark.parametrize(
    ("shapes", "names"),
    [
        (SD1, ("model_ema.diffusion_modelinput_blocks00weight", "alphas_cumprod", "betas", "posterior_variance")),
        (SD1, ("cond_stage_model.transformer.text_model.embeddings.position_ids", "sqrt_alphas_cumprod", "logvar")),
        (SD1, ("cond_stage_model.transformer.vision_model.post_layernorm.weight", f"{VAE}loss.discriminator.0")),
        (SD2, ("cond_stage_model.model.transformer.resblocks.23.ln_1.weight", "cond_stage_model.model.logit_scale")),
        (SD2, ("cond_stage_model.model.text_projection", "cond_stage_model.model.attn_mask")),
        (SDXL, ("conditioner.embedders.1.model.logit_scale", "denoiser.sigmas")),
    ],
)
def test_trainings_own_state_is_not_worth_a_word(shapes, names, tmp_path):
    assert read(tmp_path, ldm(*shapes), **dict.fromkeys(names, ("F16", (10000,)))).note == ""


@pytest.mark.parametrize("name", [f"{UNET}input_blocks.1.0.extra.weight", "odd", f"{VAE}decoder.more.bias"])
def test_a_few_numbers_without_a_place_are_told(name, tmp_path):
    note = read(tmp_path, ldm(*SD1), **{name: ("F16", (2,))}).note
    assert note == f"its file has 1 tensor that no part of it takes, such as {name}"


def test_many_numbers_without_a_place_are_another_kind_of_model(tmp_path):
    with pytest.raises(UnfitFolder, match=r"2 tensors that no part of it takes, such as a\.weight; it is another kind"):
        read(tmp_path, ldm(*SD1), **{"b.weight": ("F16", (10_000,)), "a.weight": ("F16", (10_000,))})


@pytest.mark.parametrize(
    ("shapes", "name", "kind"),
    [
        (SD2, f"{UNET}label_emb.0.0.weight", "takes more than a prompt"),
        (SD2, "embedder.model.visual.proj", "unCLIP"),
        (SD2, "depth_model.model.pretrained.act_postprocess3.0.project.0.bias", "depth model"),
        (SD2, "low_scale_model.betas", "upscaling"),
        (SD1, f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k_ip.weight", "IP-Adapter"),
        (SD1, f"{UNET}input_blocks.1.2.motion_modules.0.norm.weight", "AnimateDiff"),
        (SD1, "lora_unet_down_blocks_0_attentions_0_proj_in.alpha", "LoRA"),
    ],
)
def test_known_kinds_are_left_out_by_their_names(shapes, name, kind, tmp_path):
    with pytest.raises(UnfitFolder, match=kind):
        read(tmp_path, ldm(*shapes), **{name: ("F16", (1,))})


@pytest.fixture
def single(models, tmp_path):
    """The tiny model as a single file with its configs beside it."""
    config = shutil.copytree(models / "model", tmp_path / "from")

    return write_ldm_file(
        config, tmp_path / "here" / "one.safetensors", config=json.loads((config / "unet" / "config.json").read_text())
    )


def change(file, edit):
    save_file({name: each.contiguous() for name, each in edit(load_file(file)).items()}, file)


def load(file):
    return ModelManager(device="cpu").checkpoint(scan([file.parent]).default())


def test_a_file_with_its_own_configs_and_no_text_encoder_is_left_out(single, capsys):
    change(single, lambda tensors: without(tensors, "cond_stage_model."))
    assert not scan([single.parent]).checkpoints
    assert "has no text_encoder" in capsys.readouterr().out


def test_a_config_with_endless_layers_is_left_out_soon(single):
    config = single.with_suffix(".config") / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 999999999999'))
    assert "999999999999" in config.read_text()
    assert not scan([single.parent]).checkpoints


def test_without_a_vae_an_image_is_refused_with_what_it_needs(single):
    change(single, lambda tensors: without(tensors, VAE))
    with pytest.raises(UnusableModel, match="one has no VAE of its own; name one in `vae`") as raised:
        load(single)
    assert raised.value.field == "vae"


def parse(file, **fields):
    catalog = scan([file.parent])
    parser = Parser(catalog=catalog, abilities=ABILITIES, picture_limits=ImageLimits(), random_seed=lambda: 42)
    return parser.parse(diffusion_pb2.GenerateRequest(prompt="a cat", width_px=64, height_px=64, **fields))


def test_a_request_without_a_vae_is_refused_where_the_checkpoint_has_none(single):
    vae = {name: tensor for name, tensor in load_file(single).items() if name.startswith(VAE)}
    change(single, lambda tensors: without(tensors, VAE))
    with pytest.raises(FailedPrecondition, match="one has no VAE of its own; name one") as raised:
        parse(single)
    assert raised.value.field == "vae"
    save_file(vae, single.with_name("mine.safetensors"))
    generation = parse(single, vae="mine")
    made = ModelManager(device="cpu").checkpoint(generation.checkpoint, vae=generation.vae)
    assert made.vae.decoder.conv_in.weight.shape[1] == 4


def test_what_is_odd_about_a_file_is_a_warning_of_its_images(single):
    change(single, lambda tensors: {**tensors, "odd": torch.ones(2)})
    assert parse(single).warnings == ("one: its file has 1 tensor that no part of it takes, such as odd",)


def test_what_a_parts_folder_has_beyond_it_is_a_warning_of_its_images(models, tmp_path):
    copied = shutil.copytree(models, tmp_path / "copied")
    file = copied / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    change(file, lambda tensors: {**tensors, "odd": torch.ones(2)})
    backend = TorchBackend(ModelManager(device="cpu"), threads=1)
    row = backend.begin(replace(parse(copied / "model"), steps=1, scheduler="ddim"))
    backend.advance([row])
    assert backend.finish(row).warnings == ("copied/unet has 1 tensor that no part of it takes, such as odd",)


def test_what_a_parts_folder_has_beyond_it_is_logged(models, tmp_path, capsys):
    copied = shutil.copytree(models, tmp_path / "copied")
    change(
        copied / "model" / "unet" / "diffusion_pytorch_model.safetensors", lambda all_: {**all_, "odd": torch.ones(2)}
    )
    load(copied / "model")
    assert "weights_left_over" in (said := capsys.readouterr().out)
    assert "odd" in said


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_much_beyond_a_part_is_another_kind_of_model(part, models, tmp_path):
    copied = shutil.copytree(models, tmp_path / "copied")
    [file] = (copied / "model" / part).glob("*.safetensors")
    change(file, lambda tensors: {**tensors, "motion.weight": torch.ones(200_000)})
    with pytest.raises(FailedPrecondition, match=rf"copied/{part} has 1 tensor that no part.*such as motion\.weight"):
        load(copied / "model")


def test_a_whole_clip_in_a_text_encoders_folder_is_not_worth_a_word(models, tmp_path, capsys):
    copied = shutil.copytree(models, tmp_path / "copied")
    [file] = (copied / "model" / "text_encoder").glob("*.safetensors")
    more = {"vision_model.a.weight": torch.ones(200_000), "logit_scale": torch.ones(())}
    change(file, lambda tensors: {**tensors, **more})
    load(copied / "model")
    assert "weights_left_over" not in capsys.readouterr().out


def test_every_family_is_known_whole():
    assert all(len(set(names := whole_names(base))) == len(names) for base in TEXT_HEADS)
