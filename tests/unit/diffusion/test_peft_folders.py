"""PEFT's adapters of several parts, in folders beside each other, are one LoRA."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.diffusion.models.entries import fingerprint
from services.diffusion.models.faults import UnusableModel
from services.diffusion.models.lora_files import read_lora
from services.diffusion.models.scan import scan
from tests.unit.diffusion.test_unique_ids import ids

LAYERS = {
    "unet": "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "text_encoder": "base_model.model.text_model.encoder.layers.0.self_attn.q_proj",
    "text_encoder_2": "base_model.model.text_model.encoder.layers.0.self_attn.q_proj",
}
NAME = "adapter_model.safetensors"


def write(folder, *parts, width=768, **config):
    for part in parts:
        (folder / part).mkdir(parents=True)
        pieces = {"lora_A": torch.ones(4, width), "lora_B": torch.ones(8, 4)}
        save_file({f"{LAYERS[part]}.{name}.weight": each for name, each in pieces.items()}, folder / part / NAME)
        own = {"peft_type": "LORA", "r": 4, "lora_alpha": 8 if part == "unet" else 2, **config}
        (folder / part / "adapter_config.json").write_text(json.dumps(own))
    return folder


def the_one(folder):
    [entry] = scan([folder]).entries
    return entry


def test_the_parts_are_one_lora_of_the_folders_name(tmp_path):
    write(tmp_path / "loras" / "lora-ink", "unet", "text_encoder")
    found = scan([tmp_path])
    [entry] = found.entries
    assert (entry.id, entry.cross_attention_dim, found.left_out) == ("ink", 768, ())
    assert entry.size_bytes == sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))


def test_each_part_has_its_own_configuration(tmp_path):
    layers = read_lora(the_one(write(tmp_path / "ink", "unet", "text_encoder"))).layers
    assert {part: [layer.peft.factor(4) for layer in each.values()] for part, each in layers.items()} == {
        "unet": [2.0],
        "text_encoder": [0.5],
    }


def test_the_second_text_encoder_is_told_by_its_folder(tmp_path):
    assert list(read_lora(the_one(write(tmp_path / "ink", "text_encoder_2"))).layers) == ["text_encoder_2"]


def test_two_of_them_hide_nothing_of_each_other(tmp_path):
    for name in ("people/ink", "style/ink"):
        write(tmp_path / name, "unet", "text_encoder")
    assert ids(tmp_path) == ["people.ink", "style.ink"]


def test_a_part_that_is_replaced_is_another_file(tmp_path):
    entry = the_one(write(tmp_path / "ink", "unet", "text_encoder"))
    before, file = fingerprint(entry.path, ""), tmp_path / "ink" / "unet" / NAME
    tensors = load_file(file)
    save_file({**tensors, "a.lora_A.weight": torch.ones(1, 1)}, file)
    assert fingerprint(entry.path, "") != before
    shutil.rmtree(entry.path)
    with pytest.raises(UnusableModel, match="ink"):
        read_lora(entry)


def test_one_that_cannot_be_followed_is_left_out_once(tmp_path):
    write(tmp_path / "ink", "unet", "text_encoder", init_lora_weights="pissa")
    found = scan([tmp_path])
    assert [(each.path, "pissa" in each.reason) for each in found.left_out] == [("ink", True)]


def test_a_parts_folder_that_is_given_itself_is_searched(tmp_path):
    write(tmp_path / "ink", "unet")
    assert ids(tmp_path / "ink" / "unet") == ["adapter_model"]
