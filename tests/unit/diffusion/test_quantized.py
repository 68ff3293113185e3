"""Weights in eight bits are multiplied by the scales beside them; what is stored otherwise is left out by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.diffusion.models.faults import UnusableModel
from services.diffusion.models.model_manager import ModelManager
from services.diffusion.models.quantized import dequantized
from services.diffusion.models.recipes import UnfitFolder
from services.diffusion.models.scan import scan
from services.diffusion.models.single_files import read_file
from tests.fakes.checkpoint_files import as_rows, ldm, write_header
from tests.fakes.ldm_files import write_ldm_file

SDXL = (320, 2048)
UNET = "model.diffusion_model."
LAYER = f"{UNET}input_blocks.4.1.proj_in"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def quantized(weight, dtype=E4M3, per_channel=False):
    """A weight (O, I) in eight bits, and its scale: () or (O, 1)."""
    largest = weight.abs().amax(dim=1, keepdim=True) if per_channel else weight.abs().max()
    scale = largest.clamp(min=1e-12) / (127 if dtype is torch.int8 else 400)
    stored = (weight / scale).round() if dtype is torch.int8 else weight / scale
    return stored.to(dtype), scale


@pytest.mark.parametrize("dtype", [E4M3, E5M2, torch.int8])
@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", ["scalar", "one", "channel", "column"])
def test_weights_are_what_was_stored_times_the_scale(dtype, spelling, scale_dtype, shape):
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)) * 0.02
    stored, scale = quantized(weight, dtype, per_channel=shape in ("channel", "column"))
    scale = {"scalar": scale, "one": scale.reshape(-1), "channel": scale.reshape(-1), "column": scale}[shape]
    found = {
        "a.weight": stored,
        f"a.{spelling}": scale.to(scale_dtype),
        "a.bias": torch.ones(6),
        "scaled_fp8": torch.empty(0),
    }
    read = dequantized(found, torch.float32, lambda size: None)
    assert set(read) == {"a.weight", "a.bias"}
    steps = 0.07 if dtype is E4M3 else 0.14 if dtype is E5M2 else 0.02
    assert torch.allclose(read["a.weight"], weight, rtol=steps, atol=float(weight.abs().max()) * 0.02)


def test_convolutions_and_fused_attention_have_scales_too():
    found = {
        "conv.weight": torch.ones(2, 3, 1, 1).to(E4M3),
        "conv.weight_scale": torch.tensor([2.0, 3.0]),
        "attn.in_proj_weight": torch.ones(6, 2).to(E5M2),
        "attn.in_proj_weight_scale": torch.tensor(0.5),
    }
    read = dequantized(found, torch.float16, lambda size: None)
    assert read["conv.weight"][:, 0, 0, 0].tolist() == [2.0, 3.0]
    assert bool((read["attn.in_proj_weight"] == 0.5).all())
    assert {tensor.dtype for tensor in read.values()} == {torch.float16}


def test_scales_of_a_layers_input_change_nothing():
    found = {"a.weight": torch.ones(2, 2), "a.scale_input": torch.tensor(9.0), "a.input_scale": torch.tensor(9.0)}
    assert set(dequantized(found, torch.float32, lambda size: None)) == {"a.weight"}


def test_room_is_made_for_what_is_copied_and_for_no_more():
    asked = []
    found = {"a.weight": torch.ones(4, 4).to(E4M3), "a.weight_scale": torch.tensor(1.0), "b.weight": torch.ones(100)}
    read = dequantized(found, torch.float16, asked.append)
    assert asked == [32]
    assert read["b.weight"] is found["b.weight"]


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ({"a.weight": torch.ones(4, 4), "a.weight_scale": torch.ones(2, 2)}, "shape"),
        ({"a.weight": torch.ones(4, 4), "a.weight_scale": torch.tensor(float("nan"))}, "not finite"),
        ({"a.weight": torch.ones(1), "a.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'))}, "nvfp4"),
        ({"a.weight": torch.ones(1), "a.comfy_quant": torch.tensor(list(b"[1]"))}, "not supported"),
        ({"a.weight": torch.ones(1), "a.comfy_quant": torch.zeros(100_000, dtype=torch.uint8)}, "too large"),
        (
            {
                "a.weight": torch.ones(1),
                "a.comfy_quant": torch.tensor(list(b'{"format": "int8_tensorwise", "convrot": true}')),
            },
            "convrot",
        ),
    ],
)
def test_what_is_no_product_is_an_error(found, why):
    with pytest.raises(ValueError, match=why):
        dequantized(found, torch.float32, lambda size: None)


def test_comfyuis_plain_formats_are_read():
    told = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    found = {"a.weight": torch.ones(2, 2).to(E4M3), "a.weight_scale": torch.tensor(3.0), "a.comfy_quant": told}
    assert float(dequantized(found, torch.float32, lambda size: None)["a.weight"][0, 0]) == 3.0


def rows(**changes):
    names = {name.replace("LAYER", LAYER): value for name, value in changes.items()}
    return {**as_rows(ldm(*SDXL)), **names}


@pytest.mark.parametrize(
    "changes",
    [
        # As people share them without scales: the numbers are the weights.
        {"LAYER.weight": ("F8_E4M3", (640, 640))},
        {"LAYER.weight": ("F8_E5M2", (640, 640))},
        {"LAYER.weight": ("F8_E4M3", (640, 640)), "LAYER.scale_weight": ("F32", (1,)), "scaled_fp8": ("F8_E4M3", (0,))},
        {
            "LAYER.weight": ("F8_E5M2", (640, 640)),
            "LAYER.weight_scale": ("BF16", ()),
            f"{UNET}scaled_fp8": ("F8_E5M2", (2,)),
        },
        {
            "LAYER.weight": ("F8_E4M3", (640, 640)),
            "LAYER.weight_scale": ("F32", (640, 1)),
            "LAYER.input_scale": ("F32", ()),
        },
        {"LAYER.weight": ("I8", (640, 640)), "LAYER.weight_scale": ("F16", (640,))},
        {"LAYER.weight": ("BF16", (640, 640))},
        {"LAYER.weight": ("F64", (640, 640))},
    ],
)
def test_files_in_eight_bits_are_listed_without_a_word(changes, tmp_path):
    assert read_file(write_header(tmp_path / "model.safetensors", rows(**changes))).note == ""


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"LAYER.weight": ("F8_E4M3", (4, 4)), "scaled_fp8": ("F8_E4M3", (0,))}, "scaled_fp8.*none of the scales"),
        ({"LAYER.weight": ("F8_E4M3", (256, 256)), "LAYER.weight_scale": ("F32", (2, 2))}, "neither one scale nor one"),
        ({"LAYER.weight": ("F8_E4M3", (4, 4)), "LAYER.weight_scale": ("F8_E8M0", (4, 1))}, "packed"),
        ({"LAYER.weight": ("F8_E4M3", (4, 4)), "LAYER.weight_scale_inv": ("F32", (1, 1))}, "weight_scale_inv"),
        ({"LAYER.weight": ("U8", (4, 2)), "LAYER.weight_scale": ("F8_E4M3", (4, 1))}, "packed"),
        ({"LAYER.weight": ("F4", (4, 4))}, "packed"),
        ({"LAYER.weight": ("I8", (4, 4))}, "no scale"),
        ({"LAYER.weight": ("U8", (8, 1)), "LAYER.weight.absmax": ("F32", (4,))}, "packed"),
        ({"LAYER.qweight": ("I32", (4, 4)), "LAYER.weight": ("I8", (4, 4))}, "no scale|GPTQ"),
    ],
)
def test_what_is_stored_otherwise_is_left_out_by_name(changes, why, tmp_path):
    file = write_header(tmp_path / "model.safetensors", rows(**changes))
    with pytest.raises(UnfitFolder, match=why):
        read_file(file)


@pytest.mark.parametrize("dtype", [E4M3, E5M2, torch.int8])
@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
def test_a_checkpoint_in_eight_bits_is_loaded_with_its_scales(dtype, spelling, models, tmp_path):
    folder = models / "model"
    config = json.loads((folder / "unet" / "config.json").read_text())
    file = write_ldm_file(folder, tmp_path / "plain" / "one.safetensors", config=config)
    whole = load_file(file)
    eight = dict(whole)
    for name, tensor in whole.items():
        if name.startswith(UNET) and name.endswith(".weight") and tensor.dim() == 2:
            eight[name], scale = quantized(tensor, dtype, per_channel=dtype is torch.int8)
            eight[name.removesuffix("weight") + spelling] = scale
    shutil.copytree(file.with_suffix(".config"), tmp_path / "eight" / "one.config")
    save_file(eight, tmp_path / "eight" / "one.safetensors")
    plain, other = (
        ModelManager(device="cpu").checkpoint(scan([tmp_path / each]).default()) for each in ("plain", "eight")
    )
    for name, tensor in plain.unet.state_dict().items():
        off = (other.unet.state_dict()[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-6)
        assert float(off) < 0.15, name


def test_a_folders_part_in_eight_bits_is_loaded_with_its_scales(models, tmp_path):
    copied = shutil.copytree(models, tmp_path / "copied")
    file = copied / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    whole = load_file(file)
    stored, scale = quantized(whole["time_embedding.linear_1.weight"])
    save_file({**whole, "time_embedding.linear_1.weight": stored, "time_embedding.linear_1.weight_scale": scale}, file)
    unet = ModelManager(device="cpu").checkpoint(scan([copied]).default()).unet
    expected = whole["time_embedding.linear_1.weight"]
    assert torch.allclose(unet.time_embedding.linear_1.weight, expected, rtol=0.07, atol=0.01)


def test_a_broken_scale_is_the_checkpoints_fault(models, tmp_path):
    copied = shutil.copytree(models, tmp_path / "copied")
    file = copied / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "time_embedding.linear_1.weight_scale": torch.tensor(float("inf"))}, file)
    with pytest.raises(UnusableModel, match="unet cannot be loaded"):
        ModelManager(device="cpu").checkpoint(scan([copied]).default())
