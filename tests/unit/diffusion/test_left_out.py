"""Every file that is not used is named with the reason, in the list and in one line of the log."""

import os
import shutil

import pytest
import torch

from services.diffusion.models.left_out import LEFT_OUT_LIMIT, PATH_LIMIT, REASON_LIMIT
from services.diffusion.models.scan import scan
from services.diffusion.models.unknown_files import LARGE_BYTES
from services.diffusion.wire import left_out_to_proto
from tests.fakes.checkpoint_files import ldm
from tests.fakes.sparse_files import sparse_file

LORA = "lora_down.weight"
SD = "model.diffusion_model.input_blocks.0.0.weight"
# What lies in people's folders: the file's name, its tensors, a word of the reason.
KINDS = [
    ("flux-dev", {"double_blocks.0.img_attn.qkv.weight": (8, 8), "img_in.weight": (8, 8)}, "Flux"),
    ("flux-fp8-all", {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (8, 8),
                      "vae.decoder.conv_in.weight": (8, 16, 3, 3)}, "Flux"),
    ("flux-lora", {f"lora_unet_double_blocks_0_img_attn_qkv.{LORA}": (4, 8)}, "Flux"),
    ("flux-lora-diffusers", {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (4, 8)}, "Flux"),
    ("sd3-medium", {"model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": (8, 8),
                    "first_stage_model.decoder.conv_in.weight": (8, 16, 3, 3)}, "Stable Diffusion 3"),
    ("sd3-lora", {"transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight": (4, 8)}, "Stable Diffusion 3"),
    ("sd3-controlnet", {"transformer_blocks.0.attn.to_q.weight": (8, 8), "pos_embed_input.proj.weight": (8, 16, 2, 2)},
     "Stable Diffusion 3"),
    ("t2i-sketch", {"body.0.block1.weight": (8, 8, 3, 3), "conv_in.weight": (8, 64, 3, 3)}, "T2I-Adapter"),
    ("t2i-diffusers", {"adapter.body.0.resnets.0.block1.weight": (8, 8, 3, 3)}, "T2I-Adapter"),
    ("ip-adapter", {"image_proj.proj.weight": (8, 8), "ip_adapter.1.to_k_ip.weight": (8, 8)}, "IP-Adapter"),
    ("ip-face", {"image_proj.norm.weight": (8,), "ip_adapter.1.to_v_ip.weight": (8, 8), "a": (1,)}, "IP-Adapter"),
    ("lllite-canny", {"lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k.down.0.weight": (4, 8)}, "LLLite"),
    ("mm-sd15", {"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": (8,)}, "AnimateDiff"),
    ("motion-lora", {"down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0."
                     "processor.to_q_lora.down.weight": (4, 8)}, "AnimateDiff"),
    ("upscaler-esrgan", {"model.0.weight": (8, 3, 3, 3), "model.1.sub.0.RDB1.conv1.0.weight": (8, 8, 3, 3)},
     "upscaler"),
    ("upscaler-real", {"conv_first.weight": (8, 3, 3, 3), "body.0.rdb1.conv1.weight": (8, 8, 3, 3)}, "upscaler"),
    ("upscaler-swin", {"layers.0.residual_group.blocks.0.norm1.weight": (8,), "conv_first.bias": (8,)}, "upscaler"),
    ("clip-vision", {"vision_model.embeddings.class_embedding": (8,), "visual_projection.weight": (8, 8), "a": (2, 2)},
     "vision"),
    ("clip-alone", {"text_model.final_layer_norm.weight": (8,), "text_model.encoder.layers.0.mlp.fc1.weight": (8, 8)},
     "text encoder"),
    ("t5xxl", {"encoder.block.0.layer.0.SelfAttention.k.weight": (8, 8), "shared.weight": (8, 8)}, "T5"),
    ("unet-alone", {"conv_in.weight": (8, 4, 3, 3), "down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3)}, "UNet"),
    ("unet-ldm", {"input_blocks.0.0.weight": (8, 4, 3, 3), "output_blocks.0.0.in_layers.0.weight": (8,)}, "UNet"),
    ("gligen", {"position_net.linears.0.weight": (8, 8), "b": (1, 2)}, "GLIGEN"),
    ("brushnet", {"brushnet_down_blocks.0.weight": (8, 8, 1, 1)}, "BrushNet"),
    ("two-tables", {"a": (2, 8), "b": (2, 8)}, "no known kind"),
    ("nothing", {}, "no tensors"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shapes", "word"), KINDS, ids=[name for name, *_ in KINDS])
def test_a_file_of_another_kind_is_named_with_its_kind(name, shapes, word, tmp_path, capsys):
    sparse_file(tmp_path / "deep" / f"{name}.safetensors", shapes)
    found = scan([tmp_path])
    assert found.entries == []
    [left_out] = found.left_out
    assert left_out.path == f"deep/{name}.safetensors"
    assert word in left_out.reason
    assert capsys.readouterr().out.count(f"deep/{name}.safetensors") == 1


def oft(name):
    return {f"oft_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.{name}": (2, 8, 8)}


def test_an_oft_is_used_and_told(tmp_path, capsys):
    sparse_file(tmp_path / "kohya-oft.safetensors", oft("oft_blocks"))
    [entry] = scan([tmp_path]).entries
    assert "OFT" in entry.note
    assert "kohya-oft.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("pickled-model.ckpt", "pickle"),
        ("in-capitals.CKPT", "pickle"),
        ("yolo.pt", "pickle"),
        ("net.pth", "pickle"),
        ("pytorch_model.bin", "pickle"),
        ("flux-q4.gguf", "GGUF"),
        ("flux.sft", "rename"),
        ("face.onnx", "ONNX"),
        ("flax.msgpack", "Flax"),
        ("loras.zip", "unpack"),
        ("model.safetensors.part", "unfinished"),
        ("model.safetensors.crdownload", "unfinished"),
    ],
)
def test_a_file_that_is_not_opened_is_named_by_its_ending(name, word, tmp_path, capsys):
    (tmp_path / name).write_bytes(b"anything")
    [left_out] = scan([tmp_path]).left_out
    assert (left_out.path, word in left_out.reason) == (name, True)
    assert name in capsys.readouterr().out


def test_a_large_file_of_an_unknown_ending_is_named(tmp_path):
    with (tmp_path / "weights.xyz").open("wb") as file:
        file.truncate(LARGE_BYTES)
    assert [each.path for each in scan([tmp_path]).left_out] == ["weights.xyz"]


def test_texts_images_and_hidden_files_are_not_named(tmp_path):
    for name in ("readme.txt", "card.md", "model.yaml", "a.preview.png", "a.civitai.info", "put models here",
                 ".DS_Store", "config.json", "movie.mp4"):  # fmt: skip
        (tmp_path / name).write_bytes(b"text")
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "movie.mp4").open("wb") as file:
        file.truncate(2 * LARGE_BYTES)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "old.ckpt").write_bytes(b"x")
    assert scan([tmp_path]).left_out == ()


def test_capital_endings_are_read_as_the_others(tmp_path):
    sparse_file(tmp_path / "Style.SAFETENSORS", {f"lora_unet_down_attn2_to_k.{LORA}": (4, 768)})
    (tmp_path / "Embeddings").mkdir()
    torch.save({"*": torch.ones(2, 768)}, tmp_path / "Embeddings" / "Word.PT")
    found = scan([tmp_path])
    assert [entry.id for entry in found.entries] == ["Style", "Word"]
    assert found.left_out == ()


def test_links_to_nothing_and_pipes_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    assert [each.path for each in scan([tmp_path]).left_out] == ["gone.safetensors", "pipe.safetensors"]


def test_a_folder_of_an_unsupported_class_is_named_once(tmp_path):
    for folder, config in (
        ("clip-vision", '{"architectures": ["CLIPVisionModelWithProjection"]}'),
        ("union", '{"_class_name": "ControlNetUnionModel"}'),
        ("adapter", '{"_class_name": "T2IAdapter"}'),
        ("flux", '{"_class_name": "FluxTransformer2DModel"}'),
    ):
        sparse_file(tmp_path / folder / "model.safetensors", {"a": (2, 2, 2)})
        sparse_file(tmp_path / folder / "diffusion_pytorch_model-00001-of-00002.safetensors", {"a": (2, 2, 2)})
        (tmp_path / folder / "config.json").write_text(config)
    found = scan([tmp_path])
    assert [each.path for each in found.left_out] == ["adapter", "clip-vision", "flux", "union"]
    assert "T2IAdapter" in found.left_out[0].reason


def test_a_lora_beside_a_config_of_another_class_is_used(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    sparse_file(tmp_path / "diffusion_pytorch_model.safetensors", {"conv_in.weight": (8, 4, 3, 3)})
    sparse_file(tmp_path / "pytorch_lora_weights.safetensors", {f"lora_unet_down_attn2_to_k.{LORA}": (4, 768)})
    found = scan([tmp_path])
    assert [entry.id for entry in found.entries] == ["pytorch_lora_weights"]
    assert ["UNet2DConditionModel" in each.reason for each in found.left_out] == [True]


def test_a_models_folder_may_hold_a_config_that_is_none(tmp_path):
    """As A1111's own settings."""
    (tmp_path / "config.json").write_text('{"samples_save": true, "_class_name": "Settings"}')
    sparse_file(tmp_path / "dream.safetensors", {name: tuple(each.shape) for name, each in ldm(320, 768).items()})
    assert [entry.id for entry in scan([tmp_path]).entries] == ["dream"]


def test_a_checkpoints_folder_with_pickles_only_is_left_out(models, tmp_path):
    shutil.copytree(models / "model", tmp_path / "old")
    weights = next((tmp_path / "old" / "unet").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    [left_out] = scan([tmp_path]).left_out
    assert (left_out.path, left_out.reason) == (
        "old", "its unet has pickles only, which are not loaded; convert them to .safetensors"
    )  # fmt: skip


def test_a_worker_reports_what_it_left_out(tmp_path):
    (tmp_path / "old.ckpt").touch()
    [message] = left_out_to_proto(scan([tmp_path]))
    assert (message.path, "pickle" in message.reason, list(message.nodes)) == ("old.ckpt", True, [])


def test_the_list_is_bounded_and_its_words_are_printable(tmp_path, capsys):
    for number in range(LEFT_OUT_LIMIT + 7):
        (tmp_path / f"{number:04}.ckpt").touch()
    (tmp_path / "0000\x1b[31m\u202e.ckpt").touch()
    sparse_file(tmp_path / ("deep" * 50) / ("x" * 240 + ".safetensors"), {"\x1b[31m" * 20: (2, 2, 2)})
    found = scan([tmp_path])
    assert (len(found.left_out), found.left_out_count) == (LEFT_OUT_LIMIT, LEFT_OUT_LIMIT + 9)
    assert all(each.path.isprintable() and len(each.path) <= PATH_LIMIT for each in found.left_out)
    assert all(each.reason.isprintable() and len(each.reason) <= REASON_LIMIT for each in found.left_out)
    assert f"count={found.left_out_count - LEFT_OUT_LIMIT}" in capsys.readouterr().out


def test_a_long_path_keeps_its_end(tmp_path):
    file = tmp_path / ("folder" * 30) / ("more" * 30) / "name.ckpt"
    file.parent.mkdir(parents=True)
    file.touch()
    [left_out] = scan([tmp_path]).left_out
    assert left_out.path.endswith("/name.ckpt")
    assert left_out.path.startswith("...")
    assert len(left_out.path) == PATH_LIMIT


def test_no_path_outside_the_models_folder_is_told(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    sparse_file(tmp_path / "models" / "a.safetensors", {"a": (2, 2, 2)})
    monkeypatch.setattr("services.diffusion.models.single_files.read_header", _refused)
    [left_out] = scan([tmp_path / "models"]).left_out
    assert str(tmp_path) not in left_out.path + left_out.reason
    assert left_out.reason == "it cannot be read: Permission denied"


def _refused(path):
    raise PermissionError(13, "Permission denied", str(path))
