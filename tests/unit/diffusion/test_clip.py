"""Our CLIP gives what transformers' gives, and diffusers' classes give the same here as in diffusers itself."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from fanlight.contract.schedulers import CLASSES
from services.diffusion.diffusers_import import import_diffusers_module
from services.diffusion.models.clip import ClipText
from services.diffusion.models.loading import text_tensors

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 99}
# As the text encoders of SD 1, SD 2, SDXL (both; old configs call the end mark 2) and newer files are described.
TEXTS = {
    "sd1": {"hidden_act": "quick_gelu", "eos_token_id": 2},
    "sd2": {"hidden_act": "gelu", "eos_token_id": 2},
    "sdxl-2": {"hidden_act": "gelu", "eos_token_id": 2, "projection_dim": 24},
    "new": {"hidden_act": "quick_gelu", "eos_token_id": 98, "projection_dim": 16},
    "tanh": {"hidden_act": "gelu_new", "eos_token_id": 7, "layer_norm_eps": 1e-3},
}
START, END = 97, 98


@pytest.mark.parametrize("projects", [False, True])
@pytest.mark.parametrize("name", TEXTS)
def test_a_text_encoder_gives_what_transformers_gives(name, projects):
    torch.manual_seed(3)
    kind = CLIPTextModelWithProjection if projects else CLIPTextModel
    config = CLIPTextConfig(**SIZES, **TEXTS[name], bos_token_id=START, pad_token_id=0)
    theirs = kind(config).eval()
    ours = ClipText.from_config({**config.to_dict(), "architectures": [kind.__name__]}).eval()
    ours.load_state_dict(
        {name: each for name, each in text_tensors(theirs.state_dict()).items() if "position_ids" not in name}
    )
    ids = torch.tensor([[START, 5, 7, 96, END, *[END] * 72], [START, *range(1, 76), END], [START, END, *[0] * 75]])
    with torch.no_grad():
        made, wanted = ours(ids), theirs(ids, output_hidden_states=True)
    assert torch.allclose(made.last_hidden_state, wanted.last_hidden_state, atol=1e-5)
    # Of the last layer's states only the normalised ones are used.
    for one, other in zip(made.hidden_states[:-1], wanted.hidden_states[:-1], strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    if projects:
        assert torch.allclose(made.text_embeds, wanted.text_embeds, atol=1e-5)


UNET = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
AUTOENCODER = {"block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": 16}
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
MODELS = {
    "unets.unet_2d_condition.UNet2DConditionModel": {
        **UNET,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "sample_size": 8,
    },
    "controlnets.controlnet.ControlNetModel": {**UNET, "conditioning_embedding_out_channels": (4, 8)},
    "autoencoders.autoencoder_kl.AutoencoderKL": {**AUTOENCODER, **BLOCKS},
    "autoencoders.autoencoder_tiny.AutoencoderTiny": {},
}


def answered(name: str, model: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(5)
    latents, words = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 8)
    with torch.no_grad():
        if "autoencoder" in name:
            return model.decode(latents).sample
        if "controlnet" in name:
            return model(latents, 9, words, torch.randn(2, 3, 16, 16)).mid_block_res_sample
        return model(latents, 9, words).sample


@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_what_it_gives_in_diffusers(name):
    import diffusers

    module, _, cls = name.rpartition(".")
    torch.manual_seed(4)
    theirs = getattr(diffusers, cls)(**MODELS[name]).eval()
    ours = getattr(import_diffusers_module(f"models.{module}"), cls)(**MODELS[name]).eval()
    ours.load_state_dict(theirs.state_dict())
    assert ours.config == theirs.config
    assert torch.equal(answered(name, ours), answered(name, theirs))


# In diffusers these two are not to be made without scipy and torchsde.
ELSEWHERE = {"DPMSolverSDEScheduler", "LMSDiscreteScheduler"}


@pytest.mark.parametrize("cls", sorted(CLASSES.keys() - ELSEWHERE))
def test_a_scheduler_walks_as_in_diffusers(cls):
    import diffusers

    ours, theirs = getattr(import_diffusers_module(f"schedulers.{CLASSES[cls][0]}"), cls)(), getattr(diffusers, cls)()
    for each in (ours, theirs):
        each.set_timesteps(7)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert {**ours.config} == {**theirs.config}
