"""Every spelling of a LoRA's tensors names the same layer, and what cannot be applied is refused by its name."""

import pytest

from services.diffusion.models.lora_names import LoraName, UnsupportedForm, is_lora, lora_names, plain_name

KEY, QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "encoder.layers.0.self_attn.q_proj"
OUT = KEY.replace("to_k", "to_out.0")
ATTENTION, TEXT = KEY.removesuffix(".to_k"), "text_model.encoder.layers.0.self_attn"

SPELLINGS = {
    f"lora_unet_{KEY.replace('.', '_')}.lora_down.weight": ("unet", KEY, "down"),
    f"lycoris_unet_{KEY.replace('.', '_')}.hada_w1_a": ("unet", KEY, "hada_w1_a"),
    f"lycoris_{KEY.replace('.', '_')}.lokr_w2": ("unet", KEY, "lokr_w2"),
    f"oft_unet_{KEY.replace('.', '_')}.oft_blocks": ("unet", KEY, "oft_blocks"),
    f"unet.{KEY}.lora.up.weight": ("unet", KEY, "up"),
    f"unet.{KEY}.lora_A.weight": ("unet", KEY, "down"),
    f"unet.{KEY}.lora_A.default.weight": ("unet", KEY, "down"),
    f"unet.{KEY}.lora_B.default_0.weight": ("unet", KEY, "up"),
    f"unet.{KEY}.lora_B.my style.bias": ("unet", KEY, "up_bias"),
    f"{KEY}.lora_A.weight": ("unet", KEY, "down"),
    f"base_model.model.{KEY}.lora_B.weight": ("unet", KEY, "up"),
    f"base_model.model.{KEY}.lora_magnitude_vector": ("unet", KEY, "row_magnitude"),
    f"base_model.model.{KEY}.lora_magnitude_vector.default.weight": ("unet", KEY, "row_magnitude"),
    f"base_model.model.{KEY}.hada_w2_b.default": ("unet", KEY, "hada_w2_b"),
    f"base_model.model.{KEY}.ia3_l": ("unet", KEY, "ia3_scale"),
    f"base_model.model.{KEY}.base_layer.bias": ("unet", KEY, "whole_bias"),
    "base_model.model.conv_in.modules_to_save.default.weight": ("unet", "conv_in", "whole_weight"),
    f"module.unet._orig_mod.{KEY}.lora_A.weight": ("unet", KEY, "down"),
    f"diffusion_model.{KEY}.lora_down.weight": ("unet", KEY, "down"),
    "diffusion_model.input_blocks.1.1.proj_in.lora_A.weight": ("unet", "input_blocks.1.1.proj_in", "down"),
    "model.diffusion_model.input_blocks.1.1.proj_in.diff": ("unet", "input_blocks.1.1.proj_in", "diff"),
    f"{ATTENTION}.processor.to_k_lora.down.weight": ("unet", KEY, "down"),
    f"unet.{ATTENTION}.processor.to_out_lora.up.weight": ("unet", OUT, "up"),
    f"unet.{ATTENTION}.to_k_lora.up.weight": ("unet", KEY, "up"),
    f"lora_te_{TEXT.replace('.', '_')}_q_proj.alpha": ("text_encoder", QUERY, "alpha"),
    f"lora_te1_{TEXT.replace('.', '_')}_q_proj.dora_scale": ("text_encoder", QUERY, "magnitude"),
    f"lora_te2_{TEXT.replace('.', '_')}_q_proj.lora_up.weight": ("text_encoder_2", QUERY, "up"),
    f"text_encoder.{TEXT}.q_proj.lora_linear_layer.down.weight": ("text_encoder", QUERY, "down"),
    f"text_encoder_2.{TEXT}.to_q_lora.up.weight": ("text_encoder_2", QUERY, "up"),
    f"text_encoder.{QUERY}.lora_A.weight": ("text_encoder", QUERY, "down"),
    f"base_model.model.{TEXT}.q_proj.lora_A.weight": ("text_encoder", QUERY, "down"),
    f"text_encoders.clip_l.transformer.{TEXT}.q_proj.lora_down.weight": ("text_encoder", QUERY, "down"),
    f"clip_g.transformer.{TEXT}.q_proj.lora_down.weight": ("text_encoder_2", QUERY, "down"),
    f"lora_unet_{KEY.replace('.', '_')}.a1.weight": ("unet", KEY, "glora_a1"),
    f"lora_unet_{KEY.replace('.', '_')}.w_norm": ("unet", KEY, "diff"),
}


@pytest.mark.parametrize("name", list(SPELLINGS))
def test_a_tensors_name_says_its_part_its_layer_and_what_it_is(name):
    [read] = lora_names([name]).values()
    part, module, what = SPELLINGS[name]
    assert (read.part, plain_name(read.module), read.what) == (part, plain_name(module), what)


@pytest.mark.parametrize("name", [name for name in SPELLINGS if not name.endswith((".diff", ".base_layer.bias"))])
def test_every_spelling_is_seen_as_a_loras(name):
    assert is_lora([name]) or SPELLINGS[name][2].startswith("whole_")


@pytest.mark.parametrize(
    "name", ["model.diffusion_model.input_blocks.0.0.weight", "emb_params", "decoder.conv_in.weight", "clip_l", "alpha"]
)
def test_what_is_no_lora_is_not_seen_as_one(name):
    assert not is_lora([name])


REFUSED = {
    f"{KEY}.oft_R.weight": "an OFT of PEFT",
    f"{KEY}.oft_r.default": "an OFT of PEFT",
    f"{KEY}.boft_R.default": "a BOFT of PEFT",
    f"{KEY}.lora_E.default": "an AdaLoRA",
    f"{KEY}.vera_lambda_b.default": "a VeRA",
    f"{KEY}.fourierft_spectrum.default": "of a form that only PEFT has",
    f"lora_unet_{plain_name(KEY)}.bias_indices": "a LoCon with sparse biases",
    "lora_controlnet": "a Control-LoRA",
    "unet:0:up": "cloneofsimo",
    "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": "Flux",
    "diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight": "SD3",
    "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": "Flux",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_k.lora_down.weight": "Flux",
    "down_blocks.0.motion_modules.0.temporal_transformer.proj_in.lora_A.weight": "AnimateDiff",
    "lora_prior_unet_x.lora_down.weight": "Stable Cascade",
    f"lora_unet_{plain_name(KEY)}.what": "of an unknown form",
    # A whole weight, and nothing that says whose.
    f"lora_unet_{plain_name(KEY)}.weight": "of an unknown form",
    "bundle_emb.word.emb_params": "without a single layer",
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_form_that_is_not_applied_is_refused_by_its_name(name):
    with pytest.raises(UnsupportedForm, match=REFUSED[name]):
        lora_names([name])


def test_one_adapter_is_one_whatever_its_name_and_two_are_refused():
    unet, text = f"unet.{KEY}.lora_A.default_0.weight", f"text_encoder.{QUERY}.lora_A.default_1.weight"
    assert len(lora_names([unet, text])) == 2
    with pytest.raises(UnsupportedForm, match="two adapters, 'default_0' and 'other'"):
        lora_names([unet, unet.replace("default_0", "other")])


def test_a_vector_that_scales_is_known_by_the_mark_beside_it():
    names = [f"lora_unet_{plain_name(KEY)}.{end}" for end in ("weight", "on_input")]
    assert [each.what for each in lora_names(names).values()] == ["whole_weight", "on_input"]
    assert LoraName(part="unet", module=plain_name(KEY), what="on_input") in lora_names(names).values()
