"""Models are found by every name they have."""

import pytest

from fanlight.contract.names import ANNOTATOR_ALIASES, ANY, find_name, is_reference, near_names, need, plain_name

KNOWN = {
    "canny": ["control_v11p_sd15_canny", "lllyasviel/control_v11p_sd15_canny"],
    "Depth": ["canny-like"],
    "other": ["depth", "CANNY"],
    ANY: ["anything"],
}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("canny", "canny"),
        ("Canny.safetensors [d14c016b]", "canny"),
        ("control_v11p_sd15_canny [d14c016b]", "canny"),
        ("lllyasviel/Control_v11p_sd15_canny", "canny"),
        ("depth", "Depth"),
        ("DEPTH.ckpt", "Depth"),
        ("other", "other"),
        ("", ""),
        (" ", ""),
        (ANY, ""),
        ("anything", ""),
        ("none", ""),
        (".safetensors", ""),
    ],
)
def test_a_model_is_found_by_its_id_or_an_alias(name, meant):
    assert find_name(KNOWN, name) == meant


def test_a_plain_name_has_neither_ending_nor_hash():
    assert plain_name(" V1-5.SafeTensors [6ce0161689] ") == "v1-5"
    assert plain_name("v1.5-pruned") == "v1.5-pruned"


@pytest.mark.parametrize(
    ("name", "is_one"), [("hf:org/repo", True), ("org/repo", True), ("civitai:1@2", True), ("sd15", False)]
)
def test_a_reference_says_where_a_model_comes_from(name, is_one):
    assert is_reference(name) is is_one
    assert need("lora", name) == (f"lora:{ANY}" if is_one else f"lora:{name}")


def test_near_names_come_nearest_first_and_as_they_are_written():
    assert near_names("EULER_B", ["ddim", "Euler_a", "euler"]) == ["Euler_a", "euler"]
    assert near_names("x" * 100_000, ["ddim"]) == []


def test_no_alias_of_an_annotator_leads_to_another_alias():
    assert not set(ANNOTATOR_ALIASES.values()) & set(ANNOTATOR_ALIASES)
