import pytest

from services.weights.store.store import a1111_path

CONTROL = "controlnet_cond_embedding.x"
UNET, VAE = "model.diffusion_model.x", "first_stage_model.decoder.x"


@pytest.mark.parametrize(
    ("kind", "link", "tensors", "place"),
    [
        ("", "DreamShaper_8.safetensors", [UNET, VAE], "models/Stable-diffusion/DreamShaper_8.safetensors"),
        ("", "style.safetensors", ["lora_unet_x.lora_up.weight"], "models/Lora/style.safetensors"),
        ("", "pytorch_lora_weights.safetensors", ["unet.x.lora_A.weight"], "models/Lora/name.safetensors"),
        (
            "",
            "diffusion_pytorch_model.safetensors",
            [CONTROL],
            "models/ControlNet/name.safetensors",
        ),
        ("", "v/diffusion_pytorch_model.safetensors", ["decoder.x", "encoder.x"], "models/VAE/name.safetensors"),
        ("", "easy.safetensors", ["emb_params"], "embeddings/easy.safetensors"),
        ("textualinversion", "easy.pt", [], "embeddings/easy.pt"),
        ("lora", "old.pt", [], "models/Lora/old.pt"),
        ("checkpoint", "unet.safetensors", ["down_blocks.x"], ""),
        ("", "unknown.bin", [], ""),
    ],
)
def test_a_model_of_one_file_stands_where_the_web_ui_looks(kind, link, tensors, place):
    assert a1111_path(kind, "author/name", link, tensors) == place
