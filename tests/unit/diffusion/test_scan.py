"""Models are found in folders as people have them, and told from their headers."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fanlight.errors import FailedPrecondition, NotFound
from services.diffusion.models.entries import plain
from services.diffusion.models.marks import LDM_FIRST
from services.diffusion.models.recipes import CONFIGS, shipped
from services.diffusion.models.scan import scan, starter_folder
from tests.fakes.checkpoint_files import ldm


@pytest.mark.parametrize(
    ("shapes", "base", "size_px", "prediction"),
    [
        ((320, 768), "sd1", 512, "epsilon"),
        ((320, 1024), "sd2", 768, "v_prediction"),
        ((320, 2048), "sdxl", 1024, "epsilon"),
        ((384, 1280), "refiner", 1024, "epsilon"),
        ((320, 768, 9), "sd1", 512, "epsilon"),
        ((320, 1024, 9), "sd2", 512, "epsilon"),
    ],
)
def test_single_files_are_told_by_their_shapes(shapes, base, size_px, prediction, tmp_path):
    save_file(ldm(*shapes), tmp_path / "model one.safetensors")
    entry = scan([tmp_path]).default()
    assert (entry.id, entry.base, entry.width_px) == ("model one", base, size_px)
    assert entry.recipe.scheduler["prediction_type"] == prediction
    assert entry.unet_channels == (shapes[2] if len(shapes) > 2 else 4)


@pytest.mark.parametrize(
    ("name", "metadata", "beside", "extra", "prediction", "size_px"),
    [
        ("v2-1_512-ema-pruned", None, None, {}, "epsilon", 512),
        ("wd", {"modelspec.prediction_type": "epsilon"}, None, {}, "epsilon", 512),
        ("wd", None, 'params:\n  parameterization: "v"\n', {}, "v_prediction", 768),
        ("wd", None, "params:\n  linear_start: 1\n", {}, "epsilon", 512),
    ],
)
def test_sd2_files_say_what_they_predict(name, metadata, beside, extra, prediction, size_px, tmp_path):
    save_file({**ldm(320, 1024), **extra}, tmp_path / f"{name}.safetensors", metadata=metadata)
    if beside:
        (tmp_path / f"{name}.yaml").write_text(beside)
    entry = scan([tmp_path]).default()
    assert (entry.recipe.scheduler["prediction_type"], entry.width_px) == (prediction, size_px)


def test_a_v_prediction_sdxl_is_told_by_its_mark(tmp_path):
    save_file({**ldm(320, 2048), "v_pred": torch.zeros(1)}, tmp_path / "noob.safetensors")
    assert scan([tmp_path]).default().recipe.scheduler["prediction_type"] == "v_prediction"


def test_shapes_of_no_known_model_are_left_out_with_a_word_on_what_would_help(tmp_path, capsys):
    save_file(ldm(48, 99), tmp_path / "own.safetensors")
    assert scan([tmp_path]).entries == []
    assert "own.config" in capsys.readouterr().out


def test_a1111s_folders_are_read_as_they_are(tmp_path):
    save = {
        "Stable-diffusion/dream.safetensors": ldm(320, 768),
        "VAE/mse.safetensors": {
            "decoder.conv_in.weight": torch.zeros(8, 4, 3, 3),
            **{f"decoder.up.{block}.block.0.conv1.weight": torch.zeros(1) for block in range(4)},
        },
        "Lora/people/style.safetensors": {
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": torch.zeros(4, 768)
        },
        "ControlNet/control_v11p_sd15_canny_fp16.safetensors": {
            "control_model.input_hint_block.0.weight": torch.zeros(16, 3, 3, 3),
            "control_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, 768),
        },
        "ControlNet/control_v11e_sd15_shuffle.safetensors": {
            "control_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, 768),
        },
        "embeddings/easynegative.safetensors": {"emb_params": torch.zeros(8, 768)},
        "VAE-approx/taesd.safetensors": {"decoder.layers.0.weight": torch.zeros(64, 4, 3, 3)},
    }
    for name, tensors in save.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, tmp_path / name)
    catalog = scan([tmp_path])
    checkpoint = catalog.default()
    assert checkpoint.id == "dream"
    assert catalog.checkpoint("dream.safetensors [879db523c3]") == checkpoint
    assert catalog.vae("mse.safetensors", checkpoint).latent_factor == 8
    assert catalog.lora("style", checkpoint).cross_attention_dim == 768
    assert catalog.controlnet("control_v11p_sd15_canny [d14c016b]", checkpoint).id == "canny"
    assert catalog.controlnet("lllyasviel/control_v11e_sd15_shuffle", checkpoint).config["global_pool_conditions"]
    assert not catalog.controlnet("canny", checkpoint).config["global_pool_conditions"]
    assert catalog.embedding("EasyNegative", checkpoint).vectors == 8
    assert catalog.tiny_vae_of(checkpoint).id == "taesd"
    with pytest.raises(FailedPrecondition, match="previews"):
        catalog.vae("taesd", checkpoint)
    assert {catalog.family_of(entry) for entry in catalog.entries} == {"sd1"}


def test_the_starters_parts_are_all_found():
    catalog = scan([starter_folder()])
    starter = catalog.default()
    assert starter.id == "starter"
    assert catalog.lora("cyanotype", starter).license
    assert catalog.vae("vivid", starter).latent_factor == starter.shape.latent_factor
    assert catalog.embedding("mint", starter).vectors == 1
    assert catalog.controlnet("canny", starter).id == "canny"
    assert {catalog.family_of(entry) for entry in catalog.entries} == {"starter"}


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x10\0\0\0\0\0\0\0{}"])
def test_a_damaged_file_is_left_out_and_the_rest_is_found(content, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(content)
    save_file(ldm(320, 768), tmp_path / "good.safetensors")
    assert [entry.id for entry in scan([tmp_path]).entries] == ["good"]


@pytest.mark.parametrize(
    "tensors",
    [
        {LDM_FIRST: torch.zeros(4)},
        {"decoder.conv_in.weight": torch.zeros(4)},
        {"decoder.layers.0.weight": torch.zeros(())},
    ],
)
def test_a_file_with_the_names_of_a_model_and_other_shapes_is_left_out(tensors, tmp_path):
    save_file(tensors, tmp_path / "odd.safetensors")
    save_file(ldm(320, 768), tmp_path / "sound.safetensors")
    assert [entry.id for entry in scan([tmp_path]).entries] == ["sound"]


def test_a_folder_that_may_not_be_read_is_left_out_and_the_rest_is_found(tmp_path, monkeypatch, capsys):
    (tmp_path / "lost+found").mkdir()
    save_file(ldm(320, 768), tmp_path / "sound.safetensors")
    iterdir = type(tmp_path).iterdir

    def refused(path):
        if path.name == "lost+found":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(type(tmp_path), "iterdir", refused)
    assert [entry.id for entry in scan([tmp_path]).entries] == ["sound"]
    assert "lost+found" in capsys.readouterr().out


def test_a_name_that_nobody_has_tells_those_there_are(tmp_path):
    save_file(ldm(320, 768), tmp_path / "good.safetensors")
    catalog = scan([tmp_path])
    with pytest.raises(NotFound, match="no LoRA is called 'x'; there are none"):
        catalog.lora("x", catalog.default())


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "refiner"])
def test_the_shipped_configs_are_whole(name):
    recipe = shipped(name)
    assert recipe.base == name
    assert json.loads((CONFIGS / f"{name}.json").read_text())["unet"]["out_channels"] == recipe.vae["latent_channels"]


def test_the_shipped_tokenizer_counts_as_clips_does():
    from services.diffusion.models.tokenizer import shipped as tokenizer

    made = tokenizer("!")
    assert made.ids("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert (made.bos_token_id, made.eos_token_id, made.pad_token_id, len(made)) == (49406, 49407, 0, 49408)


@pytest.mark.parametrize(
    ("name", "bare"), [("a.safetensors", "a"), ("a [d14c016b]", "a"), ("a.b", "a.b"), (" a ", "a")]
)
def test_names_lose_hash_and_ending(name, bare):
    assert plain(name) == bare
