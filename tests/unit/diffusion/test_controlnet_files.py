"""ControlNets are told from their files: kinds that condition otherwise are never taken for ordinary ones."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.diffusion.models.scan import scan
from services.diffusion.wire import models_to_proto
from tests.fakes.sparse_files import sparse_file

TO_KEY = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
LDM = {
    "control_model.input_hint_block.0.weight": (16, 3, 3, 3),
    "control_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    f"control_model.{TO_KEY}": (320, 768),
}
WITHOUT_PREFIX = {name.removeprefix("control_model."): shape for name, shape in LDM.items()}
DIFFUSERS = {
    "controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3),
    "conv_in.weight": (320, 4, 3, 3),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 768),
}


def sdxl_net(counts=(2, 2, 10, 10)):
    """As much of an SDXL ControlNet in diffusers' names as tells its layers."""
    shapes = {
        "controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3),
        "conv_in.weight": (320, 4, 3, 3),
        "add_embedding.linear_1.weight": (1280, 2816),
    }
    places = ("down_blocks.1.attentions.0", "down_blocks.1.attentions.1", "down_blocks.2.attentions.0",
              "down_blocks.2.attentions.1")  # fmt: skip
    layers = dict(zip(places, counts, strict=True)) | {"mid_block.attentions.0": counts[-1]}
    for place, count in layers.items():
        for number in range(count):
            shapes[f"{place}.transformer_blocks.{number}.attn2.to_k.weight"] = (640, 2048)
    return shapes


SDXL = sdxl_net((2, 2, 10, 10))
WHOLE_SD = {
    "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    f"model.diffusion_model.{TO_KEY}": (320, 768),
    "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3),
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": (768,),
}


@pytest.mark.parametrize("shapes", [LDM, WITHOUT_PREFIX, DIFFUSERS, SDXL, {**LDM, **WHOLE_SD}])
def test_an_ordinary_net_is_one_in_every_layout(shapes, tmp_path):
    """Also with a whole SD 1.5 in the same file, as the first ones were shared: that is no checkpoint."""
    sparse_file(tmp_path / "control_sd15_canny.safetensors", shapes)
    found = scan([tmp_path])
    [entry] = found.entries
    assert (entry.id, entry in found.controlnets, entry.note) == ("canny", True, "")
    assert entry.shape.cross_attention_dim == (2048 if shapes is SDXL else 768)


UNION = {"task_embedding": (8, 320), "spatial_ch_projs.weight": (320, 320)}
OTHERS = [
    ("union", {**SDXL, **UNION}, "union"),
    ("promax", {**SDXL, "control_add_embedding.linear_1.weight": (1280, 2048)}, "union"),
    ("union-ldm", {**LDM, "control_model.task_embedding": (8, 320)}, "union"),
    ("union-of-sd15", {**DIFFUSERS, "transformer_layes.0.attn.in_proj_weight": (960, 320)}, "union"),
    ("small", {n: s for n, s in SDXL.items() if "attn2" not in n}, "fewer layers"),
    ("mid", sdxl_net((1, 1, 1, 1)), "fewer layers"),
    ("control-lora", {**WITHOUT_PREFIX, "lora_controlnet": (1,)}, "Control-LoRA"),
    ("xs", {**LDM, "control_model.enc_zero_convs_out.0.weight": (8, 8, 1, 1)}, "ControlNet-XS"),
    ("sparse-ctrl", {**DIFFUSERS, "down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": (8,)}, "Animate"),
    ("six-channels", {**LDM, "control_model.input_hint_block.0.weight": (16, 6, 3, 3)}, "channels"),
    ("of-inpainting", {**LDM, "control_model.input_blocks.0.0.weight": (320, 9, 3, 3)}, "channels"),
    ("odd", {**LDM, f"control_model.{TO_KEY}": (320, 99)}, "no known ControlNet"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shapes", "word"), OTHERS, ids=[name for name, *_ in OTHERS])
def test_a_net_of_another_kind_is_left_out_by_its_name(name, shapes, word, tmp_path):
    sparse_file(tmp_path / f"{name}.safetensors", shapes)
    found = scan([tmp_path])
    assert found.entries == []
    assert word in found.left_out[0].reason


def test_a_union_is_no_ordinary_net_in_a_folder_of_an_ordinary_class(models, tmp_path):
    folder = tmp_path / "controlnet-canny"
    shutil.copytree(models / "controlnet-canny", folder)
    [file] = folder.glob("*.safetensors")
    save_file({**load_file(file), "task_embedding": torch.zeros(1)}, file)
    found = scan([tmp_path])
    assert found.entries == []
    assert [(each.path, "union" in each.reason) for each in found.left_out] == [("controlnet-canny", True)]


def as_difference(folder, unet_folder):
    """The same net, saved as the difference to the UNet of a checkpoint."""
    [file] = folder.glob("*.safetensors")
    [base_file] = unet_folder.glob("*.safetensors")
    own, base = load_file(file), load_file(base_file)
    changed = {name: tensor - base[name] if name in base else tensor for name, tensor in own.items()}
    assert any(name in base for name in own)
    save_file({**changed, "difference": torch.tensor(1.0)}, file)


def test_a_difference_is_added_to_the_checkpoint_that_it_is_used_with(models, tmp_path, manager):
    for name in ("model", "controlnet-canny"):
        shutil.copytree(models / name, tmp_path / name)
    (tmp_path / "model").rename(tmp_path / "base")
    as_difference(tmp_path / "controlnet-canny", tmp_path / "base" / "unet")
    found, whole = scan([tmp_path]), scan([models])
    checkpoint, [entry] = found.default(), found.controlnets
    assert entry.is_difference
    [net] = manager.checkpoint(checkpoint, [entry]).nets
    [true_net] = manager.checkpoint(whole.default(), [whole.controlnet("canny", whole.default())]).nets
    for (name, own), other in zip(net.named_parameters(), true_net.parameters(), strict=True):
        assert torch.allclose(own, other, atol=1e-5), name


def test_a_difference_is_loaded_for_each_checkpoint(models, tmp_path, manager):
    shutil.copytree(models / "controlnet-canny", tmp_path / "controlnet-canny")
    as_difference(tmp_path / "controlnet-canny", models / "model" / "unet")
    for name in ("one", "two"):
        shutil.copytree(models / "model", tmp_path / name)
    [file] = (tmp_path / "two" / "unet").glob("*.safetensors")
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    found = scan([tmp_path])
    [entry] = found.controlnets
    first, second = (manager.checkpoint(found.checkpoint(name), [entry]).nets[0] for name in ("one", "two"))
    assert torch.allclose(first.conv_in.weight + 1, second.conv_in.weight, atol=1e-5)


def test_a_difference_is_told_in_the_list_and_in_the_log(tmp_path, capsys):
    sparse_file(tmp_path / "diff_control_sd15_canny.safetensors", {"difference": (), **LDM})
    found = scan([tmp_path])
    [model] = models_to_proto(found)
    assert "difference" in model.note
    assert "diff_control_sd15_canny.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "id_"),
    [
        ("controlnet-canny-sdxl/diffusion_pytorch_model.safetensors", "canny-sdxl"),
        ("xinsir-tile/diffusion_pytorch_model.fp16.safetensors", "xinsir-tile"),
        ("org/controlnet-depth/model.safetensors", "depth"),
        ("X/controlnet/diffusion_pytorch_model.safetensors", "X"),
        ("models--org--controlnet-canny/snapshots/" + "ab" * 20 + "/diffusion_pytorch_model.safetensors", "canny"),
        ("ControlNet/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model"),
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model"),
        ("ControlNet/mine.safetensors", "mine"),
    ],
)
def test_a_generic_file_is_called_by_its_folder(path, id_, tmp_path):
    sparse_file(tmp_path / "models" / path, LDM)
    assert [entry.id for entry in scan([tmp_path / "models"]).entries] == [id_]


def test_a_shuffle_net_is_told_by_its_folders_name_too(tmp_path):
    sparse_file(tmp_path / "control_v11e_sd15_shuffle" / "diffusion_pytorch_model.safetensors", LDM)
    [entry] = scan([tmp_path]).entries
    assert entry.config["global_pool_conditions"]


def test_a_net_in_a_pipelines_folder_is_found_beside_its_checkpoint(models, tmp_path):
    shutil.copytree(models / "model", tmp_path / "pipe")
    shutil.copytree(models / "controlnet-canny", tmp_path / "pipe" / "controlnet")
    index = tmp_path / "pipe" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "StableDiffusionControlNetPipeline"}))
    found = scan([tmp_path])
    assert [entry.id for entry in found.entries] == ["pipe", "pipe"]
    assert found.controlnets_of(found.default())
