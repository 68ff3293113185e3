"""A LoRA's tag is read as A1111 reads it, and written so that it is read again as it was."""

import pytest

from fanlight.contract.lora_tag import BadLoraTag, lora_tag, read_lora_tag
from fanlight.contract.prompt import FORGIVING, parse_prompt

# The text encoder's weight and the UNet's, by A1111's extensions-builtin/Lora/extra_networks_lora.py.
TAGS = {
    "fur": (1.0, 1.0),
    "fur:0.8": (0.8, 0.8),
    "fur:0.8:0.5": (0.8, 0.5),
    "fur:te=0.8:unet=0.5": (0.8, 0.5),
    "fur:unet=0.5": (1.0, 0.5),
    "fur:te=0.5": (0.5, 0.5),
    "fur:0.8:unet=0.5": (0.8, 0.5),
    "fur:0.8:te=0.5": (0.5, 0.5),
    "fur:0.8:0.3:te=0.5": (0.5, 0.3),
    "fur:unet=0.5:0.8": (0.8, 0.5),
    "fur: 0.8 : te = -1 ": (-1.0, -1.0),
}


@pytest.mark.parametrize("inner", list(TAGS))
def test_weights_are_taken_in_a1111s_order(inner):
    read = read_lora_tag(inner)
    assert (read.name, read.text_weight, read.unet_weight) == ("fur", *TAGS[inner])
    assert not read.unused


@pytest.mark.parametrize("inner", ["", " :1", "fur:much", "fur:te=", "fur:unet=nan", "fur:9", "fur:te=-4.1", "fur:1:"])
def test_what_is_no_weight_is_an_error(inner):
    with pytest.raises(BadLoraTag):
        read_lora_tag(inner)


def test_what_other_tools_do_something_with_is_named():
    read = read_lora_tag("fur:1:0.5:8:dyn=8:lbw=INS,1,0")
    assert read.unused == ("8", "dyn=8", "lbw=INS,1,0")
    assert (read.text_weight, read.unet_weight) == (1.0, 0.5)
    forgiving = parse_prompt("a <lora:fur:1:lbw=ALL>", "prompt", FORGIVING)
    assert [tag.name for tag in forgiving.loras] == ["fur"]
    assert forgiving.warnings == ("character 3: 'lbw=ALL' in a LoRA's tag was not used",)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.8, 0.5), (-0.25, 0.0)])
def test_a_tag_that_is_written_is_read_again(weights):
    text_weight, unet_weight = weights
    tag = lora_tag("fur", unet_weight=unet_weight, text_weight=text_weight)
    read = read_lora_tag(tag.removeprefix("<lora:").removesuffix(">"))
    assert (read.text_weight, read.unet_weight) == weights
