"""PEFT's rules for the scale of a layer: alpha / r, rsLoRA, patterns; from metadata, or from the file beside."""

import json
from pathlib import Path

import pytest

from services.diffusion.models.name_patterns import BadPattern
from services.diffusion.models.peft_config import BadPeftConfig, peft_scales
from services.diffusion.models.recipes import UnfitFolder

NOWHERE = Path("nowhere/style.safetensors")
KEY = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


def of_metadata(config):
    return peft_scales(NOWHERE, {"lora_adapter_metadata": config if isinstance(config, str) else json.dumps(config)})


# By PEFT's tuners/lora/layer.py: alpha / r, or alpha / sqrt(r); the first pattern in order that matches.
@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"unet.r": 4, "unet.lora_alpha": 6}, 1.5),
        ({"unet.r": 4, "unet.lora_alpha": 6, "unet.use_rslora": True}, 3.0),
        ({"unet.r": 4}, 2.0),
        ({"r": 4, "lora_alpha": 2}, 0.5),
        ({"unet.r": 4, "unet.lora_alpha": 0}, 0.0),
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"to_k": 2}}, 0.5),
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"attn2.to_k": 2, "to_k": 8}}, 0.5),
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {r".*attn2\.to_[kv]": 2}}, 0.5),
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {KEY: 2}}, 0.5),
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"o_k": 2, "attn2": 3}}, 1.5),
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"to_k": 4}, "unet.use_rslora": True}, 2.0),
    ],
)
def test_a_layers_factor_is_pefts(config, factor):
    assert of_metadata(config)("unet", KEY).factor(4) == pytest.approx(factor)


def test_each_part_has_its_own_configuration_or_none():
    scales = of_metadata({"unet.r": 4, "unet.lora_alpha": 6, "text_encoder.r": 2, "text_encoder.lora_alpha": 8})
    assert scales("text_encoder", "text_model.encoder.layers.0.mlp.fc1").factor(2) == 4.0
    assert scales("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1") is None
    assert peft_scales(NOWHERE, {})("unet", KEY) is None


def test_ranks_that_the_tensors_do_not_show_are_the_configurations():
    config = {"r": 4, "alpha": 6, "rank_pattern": {"to_k": 12}, "feedforward_modules": ["to_k", "net.2"]}
    scale = of_metadata(config)("unet", KEY)
    assert (scale.rank, scale.alpha, scale.is_feedforward) == (12, 6, True)
    assert not of_metadata(config)("unet", KEY.replace("to_k", "xto_k")).is_feedforward


def test_the_file_beside_is_for_pefts_file_or_for_the_only_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 16, "lora_alpha": 4, "use_rslora": True}))
    file = tmp_path / "style.safetensors"
    file.touch()
    assert peft_scales(file, {})("unet", KEY).factor(16) == 1.0
    (tmp_path / "other.safetensors").touch()
    assert peft_scales(file, {})("unet", KEY) is None
    assert peft_scales(tmp_path / "adapter_model.safetensors", {})("unet", KEY).factor(16) == 1.0
    said = {"lora_adapter_metadata": json.dumps({"unet.r": 16, "unet.lora_alpha": 32})}
    assert peft_scales(tmp_path / "adapter_model.safetensors", said)("unet", KEY).factor(16) == 2.0


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ("{", "no JSON"),
        ("[1]", "no object"),
        ("[" * 100_000, "no JSON"),
        ({"r": "four"}, "its r is 'four', which is no number"),
        ({"r": 0}, "ranks are above 0"),
        ({"r": True}, "no number"),
        ('{"r": 4, "lora_alpha": NaN}', "no number"),
        ('{"r": 4, "lora_alpha": 1e999}', "no number"),
        ({"r": 4, "lora_alpha": None}, "no number"),
        ({"use_rslora": "yes"}, "not true or false"),
        ({"r": 4, "alpha_pattern": [1]}, "alpha_pattern is no object"),
        ({"r": 4, "alpha_pattern": {"x": {}}}, "no number"),
        ({"r": 4, "rank_pattern": {"x": -1}}, "rank_pattern has a rank"),
        ({"r": 4, "alpha_pattern": {f"a{at}": 1 for at in range(4_097)}}, "at most 4096"),
        ({"r": 4, "init_lora_weights": "pissa_niter_4"}, "changes the model's own weights"),
        ({"r": 4, "use_qalora": True}, "use_qalora is set"),
    ],
)
def test_a_configuration_that_cannot_be_followed_is_refused_by_what_is_in_it(config, why):
    with pytest.raises(BadPeftConfig, match=why):
        of_metadata(config)


def test_a_bad_pattern_is_refused_and_one_that_never_ends_elsewhere_is_followed():
    with pytest.raises(BadPattern, match="never closed"):
        of_metadata({"r": 4, "alpha_pattern": {"(": 1}})
    hostile = of_metadata({"r": 4, "lora_alpha": 4, "alpha_pattern": {"(([a-z_0-9.])+.)+X": 1}})
    assert all(hostile("unet", f"{KEY}{at}").factor(4) == 1.0 for at in range(50))


def test_a_file_beside_that_is_no_configuration_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("no")
    with pytest.raises(UnfitFolder, match=r"adapter_config\.json cannot be read"):
        peft_scales(tmp_path / "adapter_model.safetensors", {})
