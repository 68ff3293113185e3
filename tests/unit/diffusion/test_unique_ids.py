"""Two files of one name are two models, and the bare name is an error that lists both."""

import os

import pytest
import torch
from safetensors.torch import save_file

from fanlight.contract.names import shares_name
from fanlight.errors import NotFound
from services.diffusion.models.scan import scan
from tests.fakes.checkpoint_files import ldm
from tests.fakes.sparse_files import sparse_file
from tests.unit.diffusion.test_controlnet_files import LDM

UNET = "model.diffusion_model."
CHECKPOINT = {name: tuple(tensor.shape) for name, tensor in ldm(320, 768).items()}
LORA = {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 768)}
TEXT_LORA = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 768)}
SDXL_LORA = dict.fromkeys(LORA, (4, 2048))
VAE = {"decoder.conv_in.weight": (8, 4, 3, 3), **{f"decoder.up.{n}.block.0.conv1.weight": (1,) for n in range(4)}}
EMBEDDING = {"emb_params": (2, 768)}


def ids(folder):
    return sorted(entry.id for entry in scan([folder]).entries)


@pytest.mark.parametrize("shapes", [LORA, VAE, EMBEDDING, CHECKPOINT, LDM], ids=lambda shapes: next(iter(shapes)))
def test_two_folders_with_one_name_are_told_apart_by_the_folders(shapes, tmp_path):
    for folder in ("people", "style"):
        sparse_file(tmp_path / folder / "detail.safetensors", shapes)
    assert ids(tmp_path) == ["people.detail", "style.detail"]
    assert scan([tmp_path]).left_out == ()


def test_the_bare_name_is_an_error_that_lists_both(tmp_path):
    sparse_file(tmp_path / "dream.safetensors", CHECKPOINT)
    for folder in ("people", "style"):
        sparse_file(tmp_path / folder / "Detail.safetensors", LORA)
        sparse_file(tmp_path / folder / "big.safetensors", CHECKPOINT)
    found = scan([tmp_path])
    with pytest.raises(NotFound, match=r"several have the name 'detail': write people\.Detail and style\.Detail"):
        found.lora("detail", found.checkpoint("dream"))
    with pytest.raises(NotFound, match=r"several .* people\.big and style\.big"):
        found.checkpoint("big.safetensors")
    assert found.lora("style.detail", found.checkpoint("dream")).path.parent.name == "style"


def test_as_many_folders_are_named_as_are_needed(tmp_path):
    for folder in ("a/x", "b/x", "c/y"):
        sparse_file(tmp_path / folder / "detail.safetensors", LORA)
    assert ids(tmp_path) == ["a.x.detail", "b.x.detail", "y.detail"]


def test_generic_files_in_folders_of_one_name_are_told_apart(tmp_path):
    for folder in ("a/detail", "b/detail"):
        sparse_file(tmp_path / folder / "pytorch_lora_weights.safetensors", LORA)
    assert ids(tmp_path) == ["a.detail", "b.detail"]


@pytest.mark.parametrize(
    ("path", "shapes", "id_"),
    [
        ("Lora/lora-ink/pytorch_lora_weights.safetensors", LORA, "ink"),
        ("Lora/ink/pytorch_lora_weights.fp16.safetensors", LORA, "ink"),
        ("loras/pytorch_lora_weights.safetensors", LORA, "pytorch_lora_weights"),
        ("vae-mse/diffusion_pytorch_model.safetensors", VAE, "mse"),
        ("mse/vae/diffusion_pytorch_model.safetensors", VAE, "mse"),
        ("vae/diffusion_pytorch_model.safetensors", VAE, "diffusion_pytorch_model"),
        ("embeddings/mint/learned_embeds.safetensors", EMBEDDING, "mint"),
        ("embeddings/mint/learned_embeds-steps-500.safetensors", EMBEDDING, "mint"),
        ("Stable-diffusion/dream/model.safetensors", CHECKPOINT, "dream"),
        ("Stable-diffusion/model.safetensors", CHECKPOINT, "model"),
        ("checkpoints/dream.fp16.safetensors", CHECKPOINT, "dream.fp16"),
    ],
)
def test_a_generic_file_is_called_by_its_folder(path, shapes, id_, tmp_path):
    sparse_file(tmp_path / "models" / path, shapes)
    assert ids(tmp_path / "models") == [id_]


def test_two_roots_hide_nothing_of_each_other(tmp_path):
    for root in ("mine", "shared"):
        sparse_file(tmp_path / root / "dream.safetensors", CHECKPOINT)
    found = scan([tmp_path / "mine", tmp_path / "shared"])
    assert [entry.id for entry in found.entries] == ["mine.dream", "shared.dream"]


def test_families_may_share_a_name_where_files_tell_them(tmp_path):
    sparse_file(tmp_path / "sd" / "detail.safetensors", LORA)
    sparse_file(tmp_path / "xl" / "detail.safetensors", SDXL_LORA)
    assert ids(tmp_path) == ["detail", "detail"]


def test_a_lora_that_fits_any_family_shares_no_name(tmp_path):
    sparse_file(tmp_path / "sd" / "detail.safetensors", LORA)
    sparse_file(tmp_path / "te" / "detail.safetensors", TEXT_LORA)
    assert ids(tmp_path) == ["sd.detail", "te.detail"]


def test_case_tells_no_models_apart(tmp_path):
    sparse_file(tmp_path / "a" / "Detail.safetensors", LORA)
    sparse_file(tmp_path / "b" / "detail.safetensors", LORA)
    assert ids(tmp_path) == ["a.Detail", "b.detail"]


def test_of_nets_with_one_short_id_the_usual_one_keeps_it(tmp_path):
    for name in ("a_control_sd15_canny", "control_v11p_sd15_canny", "control_v11p_sd15_canny_fp16",
                 "diff_control_sd15_canny"):  # fmt: skip
        shapes = {"difference": (), **LDM} if name.startswith("diff") else LDM
        sparse_file(tmp_path / f"{name}.safetensors", shapes)
    sparse_file(tmp_path / "dream.safetensors", CHECKPOINT)
    found = scan([tmp_path])
    by_id = {entry.id: entry.path.stem for entry in found.controlnets}
    assert by_id["canny"] == "control_v11p_sd15_canny"
    assert set(by_id) == {
        "canny", "a_control_sd15_canny", "control_v11p_sd15_canny_fp16", "diff_control_sd15_canny"
    }  # fmt: skip
    named = found.controlnet("diff_control_sd15_canny", found.default())
    assert named.is_difference


def test_of_files_that_differ_in_their_ending_the_safetensors_is_used(tmp_path):
    folder = tmp_path / "embeddings"
    folder.mkdir()
    save_file({"emb_params": torch.zeros(2, 768)}, folder / "easy.safetensors")
    torch.save({"*": torch.zeros(2, 768)}, folder / "easy.pt")
    found = scan([tmp_path])
    assert [(entry.id, entry.path.name) for entry in found.entries] == [("easy", "easy.safetensors")]
    assert [each.path for each in found.left_out] == ["embeddings/easy.pt"]
    assert "easy.safetensors" in found.left_out[0].reason


def test_links_to_one_file_are_one_model(tmp_path):
    sparse_file(tmp_path / "a" / "detail.safetensors", LORA)
    (tmp_path / "b").mkdir()
    os.link(tmp_path / "a" / "detail.safetensors", tmp_path / "b" / "detail.safetensors")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "detail.safetensors").symlink_to(tmp_path / "a" / "detail.safetensors")
    found = scan([tmp_path])
    assert ([entry.id for entry in found.entries], found.left_out) == (["detail"], ())


def test_an_id_that_cannot_be_told_apart_is_left_out(tmp_path):
    name = "n" * 200
    for folder in ("a" * 100, "b" * 100, "c" * 100):
        sparse_file(tmp_path / folder / f"{name}.safetensors", LORA)
    found = scan([tmp_path])
    assert [entry.id for entry in found.entries] == [name]
    assert [each.path[:2] for each in found.left_out] == ["..", ".."]
    assert "rename it" in found.left_out[0].reason


def test_a_version_behind_a_point_is_no_shared_name(tmp_path):
    sparse_file(tmp_path / "dream-v1.5.safetensors", CHECKPOINT)
    with pytest.raises(NotFound, match=r"no checkpoint is called '5'; there are dream-v1\.5"):
        scan([tmp_path]).checkpoint("5")


@pytest.mark.parametrize(
    ("id_", "name", "shares"),
    [
        ("people.detail", "detail", True),
        ("people.Detail", " detail.safetensors [0123456789]", True),
        ("people.detail", "tail", False),
        ("detail", "detail", False),
        ("people.detail", "", False),
    ],
)
def test_a_name_is_shared_by_ids_with_a_folder_before_it(id_, name, shares):
    assert shares_name(id_, name) is shares
