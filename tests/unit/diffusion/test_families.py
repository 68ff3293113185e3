"""SDXL, its refiner and SD 2: generated as diffusers generates them, and a single file is its folder."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img import (
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from fanlight.contract.prompt import read_weights
from fanlight.errors import FailedPrecondition
from services.diffusion.engine.backend import assemble
from services.diffusion.engine.conditioning import ConditioningCache
from services.diffusion.engine.generation import Start
from services.diffusion.models.entries import LoraUse
from services.diffusion.models.faults import UnusableModel
from services.diffusion.models.scan import read_path, scan
from services.diffusion.prompt import to_chunks
from services.diffusion.provenance import infotext
from tests.fakes.families import make_tiny_refiner, make_tiny_sd2, make_tiny_sdxl
from tests.fakes.ldm_files import write_ldm_file, write_parts

LIMIT = 1e-4
NAMES = ("base", "refiner", "second")


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> Path:
    """`folders/NAME`, `files/NAME.safetensors` and `parts/NAME` of each model."""
    root = tmp_path_factory.mktemp("families")
    for name, make in zip(NAMES, (make_tiny_sdxl, make_tiny_refiner, make_tiny_sd2), strict=True):
        folder = make(root / "folders" / name)
        config = json.loads((folder / "unet" / "config.json").read_text())
        file = write_ldm_file(folder, root / "files" / f"{name}.safetensors", config=config)
        write_parts(file, root / "parts" / name)
    return root


@pytest.fixture(scope="module")
def of(families, asked):
    """A generation with one of the models."""

    def ask(name, kind="folders", **fields):
        checkpoint = scan([families / kind]).checkpoint(name)
        return replace(asked(**fields), checkpoint=checkpoint, scheduler=fields.get("scheduler", "euler"))

    return ask


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["files", "parts"])
def test_a_single_file_and_its_parts_hold_the_folders_very_weights(name, kind, families, manager):
    ours, theirs = (manager.checkpoint(scan([families / where]).checkpoint(name)) for where in (kind, "folders"))
    modules = [(one.unet, one.vae, *(text.encoder for text in one.texts)) for one in (ours, theirs)]
    for one, other in zip(*modules, strict=True):
        states = one.state_dict(), other.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("negative", ["", "blurry"])
def test_sdxl_equals_the_pipeline(negative, families, of, generated):
    generation = of("base", negative_prompt=negative)
    pipeline = StableDiffusionXLPipeline.from_pretrained(families / "folders" / "base", add_watermarker=False)
    # Without a negative prompt the pipeline looks at zeros, as the model was trained.
    wanted = _run(pipeline, generation, negative_prompt=negative or None, height=64, width=64)
    [row] = generated(generation)
    assert float((row.latents - wanted).abs().max()) <= LIMIT


def test_the_refiner_goes_on_from_an_image_as_the_pipeline_does(families, of, generated):
    image = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
    generation = of("refiner", steps=6, start=Start(image=image, strength=0.5))
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(families / "folders" / "refiner", add_watermarker=False)
    wanted = _run(pipeline, generation, negative_prompt="blurry", image=image, strength=0.5)
    [row] = generated(generation)
    assert float((row.latents - wanted).abs().max()) <= LIMIT


def test_sd2_in_a_single_file_equals_the_pipeline(families, of, generated):
    generation = of("second", kind="files", scheduler="ddim")
    pipeline = StableDiffusionPipeline.from_pretrained(families / "folders" / "second")
    wanted = _run(pipeline, generation, negative_prompt="blurry", height=64, width=64)
    [row] = generated(generation)
    assert float((row.latents - wanted).abs().max()) <= LIMIT


def test_the_refiner_offers_only_what_goes_on_from_an_image(families):
    entry = scan([families / "folders"]).checkpoint("refiner")
    assert entry.takes_aesthetic_score
    assert not scan([families / "folders"]).checkpoint("base").takes_aesthetic_score


def test_a_view_without_the_vaes_encoder_decodes_and_says_that_it_cannot_encode(
    families, manager, tmp_path, generated, of
):
    parts = tmp_path / "second"
    parts.mkdir()
    for file in (families / "parts" / "second").iterdir():
        if file.name != "vae_encoder.safetensors":
            (parts / file.name).symlink_to(file)
    (tmp_path / "second.config").symlink_to(families / "parts" / "second.config")
    generation = replace(of("second"), checkpoint=scan([tmp_path]).checkpoint("second"), steps=2)
    assert not manager.checkpoint(generation.checkpoint).can_encode
    [row] = generated(generation)
    assert row.is_finished
    started = replace(generation, start=Start(image=Image.new("RGB", (64, 64)), strength=1.0))
    with pytest.raises(FailedPrecondition):
        generated(started)


@pytest.mark.parametrize("lacking", ["model.diffusion_model.out.2.weight", "first_stage_model.decoder.conv_in.weight"])
def test_a_single_file_that_lacks_a_tensor_is_a_typed_error(lacking, families, manager, tmp_path):
    tensors = load_file(families / "files" / "second.safetensors")
    del tensors[lacking]
    save_file(tensors, tmp_path / "second.safetensors")
    (tmp_path / "second.config").symlink_to(families / "files" / "second.config")
    with pytest.raises(UnusableModel, match="second/"):
        manager.checkpoint(scan([tmp_path]).checkpoint("second"))


def _run(pipeline, generation, **arguments):
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        prompt=generation.prompt,
        num_inference_steps=generation.steps,
        guidance_scale=generation.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(generation.seed),
        output_type="latent",
        **arguments,
    ).images
    return torch.as_tensor(images)


@pytest.fixture
def sdxl_lora(families, tmp_path):
    """Layers of the UNet and of both text encoders, as diffusers writes them and as kohya does."""
    layers = {
        "unet.mid_block.attentions.0.transformer_blocks.1.attn2.to_k": ("lora_unet_middle_block_1", (32, 40)),
        "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": ("lora_unet_output_blocks_1_1", (32, 32)),
        "text_encoder.text_model.encoder.layers.1.self_attn.out_proj": ("lora_te1", (16, 16)),
        "text_encoder_2.text_model.encoder.layers.0.self_attn.out_proj": ("lora_te2", (24, 24)),
    }
    ours, theirs = {}, {}
    for seed, (name, (head, (out, into))) in enumerate(layers.items()):
        generator = torch.Generator().manual_seed(seed)
        down, up = torch.randn(2, into, generator=generator) * 0.3, torch.randn(out, 2, generator=generator) * 0.3
        theirs |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        rest = name.partition("attentions.")[2] if head.startswith("lora_unet") else name
        inner = rest.partition(".")[2]
        kohya = f"{head}_{inner.replace('.', '_')}"
        ours |= {f"{kohya}.lora_down.weight": down, f"{kohya}.lora_up.weight": up, f"{kohya}.alpha": torch.tensor(2.0)}
    save_file(ours, tmp_path / "kohya.safetensors")
    save_file(theirs, tmp_path / "peft.safetensors")
    return tmp_path


def test_sdxl_loras_go_to_the_unet_and_both_text_encoders_in_either_form(sdxl_lora, of, manager):
    made = []
    for file in ("kohya", "peft"):
        entry = read_path(sdxl_lora / f"{file}.safetensors")
        checkpoint = assemble(manager, of("base", loras=(LoraUse(entry=entry, unet_weight=0.5, text_weight=0.5),)))
        made.append([checkpoint.unet, *(text.encoder for text in checkpoint.texts)])
    plain = manager.checkpoint(of("base").checkpoint)
    for one, other, pristine in zip(*made, [plain.unet, *(text.encoder for text in plain.texts)], strict=True):
        states = [module.state_dict() for module in (one, other, pristine)]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_a_lora_on_all_parts_of_sdxl_equals_diffusers_fused(sdxl_lora, families, of, generated):
    pytest.importorskip("peft")
    entry = read_path(sdxl_lora / "kohya.safetensors")
    generation = of("base", loras=(LoraUse(entry=entry, unet_weight=0.5, text_weight=0.5),))
    pipeline = StableDiffusionXLPipeline.from_pretrained(families / "folders" / "base", add_watermarker=False)
    pipeline.load_lora_weights(sdxl_lora, weight_name="kohya.safetensors")
    pipeline.fuse_lora(lora_scale=0.5)
    wanted = _run(pipeline, generation, negative_prompt="blurry", height=64, width=64)
    [row] = generated(generation)
    assert float((row.latents - wanted).abs().max()) <= 1e-3


def embeds_of(generation, manager) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the prompt and the negative one, (1, L, C)."""
    conditioning = ConditioningCache().get(generation, manager.checkpoint(generation.checkpoint)).at(1)
    return conditioning.prompts[0][0].embeds, conditioning.unconditional.embeds


def test_clip_skip_changes_nothing_for_sdxl(of, manager):
    plain = embeds_of(of("base", negative_prompt="bad"), manager)
    for fields in ({"clip_skip": 2}, {"clip_skip": 3}, {"sdxl_clip_skip": 2}):
        for one, other in zip(plain, embeds_of(of("base", negative_prompt="bad", **fields), manager), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("skip", [1, 3])
def test_sdxls_own_clip_skip_takes_another_layer_of_both_encoders_for_both_prompts(skip, of, manager):
    """Counted as in ComfyUI, whose `CLIPSetLastLayer` of -2 is what SDXL was trained with."""
    generation = of("base", prompt="a cat", negative_prompt="a cat", sdxl_clip_skip=skip)
    checkpoint = manager.checkpoint(generation.checkpoint)
    prompt, negative = embeds_of(generation, manager)
    assert torch.equal(prompt, negative)
    chunks = [to_chunks(text, read_weights("a cat"), "prompt")[0] for text in checkpoint.texts]
    states = []
    for text, chunk in zip(checkpoint.texts, chunks, strict=True):
        ids = [text.tokenizer.bos_token_id, *chunk.ids, text.tokenizer.eos_token_id]
        ids += [text.tokenizer.pad_token_id] * (text.positions - len(ids))
        states.append(text.encoder(torch.tensor([ids])).hidden_states[-skip])
    assert torch.equal(prompt, torch.cat(states, dim=-1))


def test_the_text_says_which_clip_skip_counted(of):
    def fields(name, **options) -> str:
        return infotext(of(name, **options), lambda entry: (), version="1").splitlines()[-1]

    assert "lip skip" not in fields("base", clip_skip=2)
    assert "SDXL clip skip: 3" in fields("base", clip_skip=2, sdxl_clip_skip=3)
    assert ", Clip skip: 2," in fields("second", clip_skip=2)
    assert "SDXL" not in fields("second", sdxl_clip_skip=3)
