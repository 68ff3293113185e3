"""The starter model's own LoRA, textual inversion and VAE, against diffusers. LoRAs need peft there."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from services.diffusion.engine.backend import assemble
from services.diffusion.models.entries import LoraEntry, LoraUse
from services.diffusion.models.scan import read_path, scan, starter_folder

LIMIT = 1e-3
STARTER = starter_folder()


@pytest.fixture(scope="module")
def starters():
    return scan([STARTER])


@pytest.fixture
def pipeline():
    made = StableDiffusionPipeline.from_pretrained(STARTER / "model", torch_dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def of_starter(starters, asked):
    def ask(**fields):
        wanted = {"prompt": "a red apple", "negative_prompt": "", "steps": 4, "guidance_scale": 4.0, **fields}
        starter = starters.default()
        size = {"width_px": starter.width_px, "height_px": starter.height_px}
        return replace(asked(**{**wanted, **size}), checkpoint=starter)

    return ask


def generated_pixels(backend, row):
    return torch.from_numpy(backend.finish(row).pixels).float() / 255


def wanted_of(pipeline, generation):
    images = pipeline(
        prompt=generation.prompt,
        negative_prompt=generation.negative_prompt,
        num_inference_steps=generation.steps,
        guidance_scale=generation.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(generation.seed),
        output_type="latent",
    ).images
    return torch.as_tensor(images)


@pytest.mark.parametrize("file", ["pytorch_lora_weights", "kohya"])
def test_its_lora_in_both_forms_equals_diffusers_fused(file, pipeline, of_starter, generated):
    pytest.importorskip("peft")
    path = STARTER / "lora-cyanotype" / f"{file}.safetensors"
    entry = read_path(path)
    assert isinstance(entry, LoraEntry)
    generation = of_starter(loras=(LoraUse(entry=entry, unet_weight=0.8, text_weight=0.8),))
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    pipeline.fuse_lora(lora_scale=0.8)
    [row] = generated(generation)
    assert float((row.latents - wanted_of(pipeline, generation)).abs().max()) <= LIMIT


def test_its_two_forms_of_the_lora_are_the_same_image(of_starter, generated):
    entries = [read_path(file) for file in sorted((STARTER / "lora-cyanotype").glob("*.safetensors"))]
    one, other = generated(*(of_starter(loras=(LoraUse(entry=entry),)) for entry in entries))
    assert float((one.latents - other.latents).abs().max()) <= LIMIT
    [plain] = generated(of_starter())
    assert float((one.latents - plain.latents).abs().max()) > 0.05


@pytest.mark.parametrize("file", ["mint", "mint.a1111"])
def test_its_textual_inversion_equals_diffusers(file, starters, pipeline, of_starter, manager):
    """The states of a prompt with its token."""
    [entry] = [each for each in starters.embeddings_of(starters.default()) if each.id == file]
    pipeline.load_textual_inversion(STARTER / "embeddings" / f"{file}.safetensors", token="<it>")
    [text] = assemble(manager, of_starter(embeddings=(entry,))).texts
    words = text.tokenizer.ids("a  apple")
    ids = [text.tokenizer.bos_token_id, words[0], *text.added[entry.id], *words[1:], text.tokenizer.eos_token_id]
    row = torch.tensor([ids + [text.tokenizer.pad_token_id] * (text.positions - len(ids))])
    theirs = pipeline.tokenizer("a <it> apple", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.inference_mode():
        ours, wanted = text.encoder(row).last_hidden_state, pipeline.text_encoder(theirs)[0]
    assert float((ours - wanted).abs().max()) <= LIMIT


def test_its_second_vae_equals_diffusers(starters, pipeline, of_starter, generated, backend):
    generation = of_starter(vae=starters.vae("vivid", starters.default()))
    [row] = generated(generation)
    vae = AutoencoderKL.from_pretrained(STARTER / "vae-vivid", torch_dtype=torch.float32)
    with torch.inference_mode():
        pixels = vae.decode(row.latents / vae.config.scaling_factor).sample[0].permute(1, 2, 0)
    wanted = (pixels * 0.5 + 0.5).clamp(0, 1)
    # A pixel of 8 bits may be one apart.
    assert float((generated_pixels(backend, row) - wanted).abs().max()) <= 1 / 255
    [plain] = generated(of_starter())
    assert float((generated_pixels(backend, plain) - generated_pixels(backend, row)).abs().max()) > 0.02
