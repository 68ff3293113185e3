import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanlight.errors import InvalidField
from services.weights.references.references import (
    AirRef,
    CatalogRef,
    HubRef,
    LocalRef,
    S3Ref,
    UrlRef,
    is_safe_path,
    parse,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:org/repo", HubRef(repo="org/repo")),
        ("org/repo", HubRef(repo="org/repo")),
        ("hf:org/repo@main/unet", HubRef(repo="org/repo", revision="main", subfolder="unet")),
        ("hf:org/repo/a/b.safetensors", HubRef(repo="org/repo", subfolder="a/b.safetensors")),
        ("hf:org/repo@refs/pr/41/x", HubRef(repo="org/repo", revision="refs/pr/41", subfolder="x")),
        ("urn:air:qwen3:repository:huggingface:Civitai/x@main.tar", HubRef(repo="Civitai/x", revision="main")),
        ("air:sd1:lora:huggingface:org/repo@style.safetensors", HubRef(repo="org/repo", subfolder="style.safetensors")),
        ("s3://bucket/a/b.safetensors", S3Ref(bucket="bucket", key="a/b.safetensors")),
        ("s3://bucket/a/b/", S3Ref(bucket="bucket", key="a/b/")),
        ("https://example.org/m.safetensors?x=1", UrlRef(url="https://example.org/m.safetensors?x=1")),
        ("./models/x", LocalRef(path="./models/x")),
        ("/models/x", LocalRef(path="/models/x")),
        ("sd15", CatalogRef(name="sd15")),
        ("catalog:controlnet/canny", CatalogRef(name="controlnet/canny")),
    ],
)
def test_a_reference_is_read_as_it_is_written(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "urn:air:sd1:lora:civitai:82098@87153",
            AirRef(source="civitai", id="82098", version="87153", ecosystem="sd1", type="lora"),
        ),
        ("civitai:4384@128713", AirRef(source="civitai", id="4384", version="128713")),
        ("URN:AIR:sd1:lora:civitai:1@2", AirRef(source="civitai", id="1", version="2", ecosystem="sd1", type="lora")),
        (
            "urn:air:sdxl:checkpoint:civitai:827184@2514310+2402203.safetensors",
            AirRef(
                source="civitai",
                id="827184",
                version="2514310",
                ecosystem="sdxl",
                type="checkpoint",
                file_id="2402203",
                format="safetensors",
            ),
        ),
        (
            "urn:air:other:other:civitai-r2:civitai-worker-assets@sam_vit_b_01ec64.pth",
            AirRef(
                source="civitai-r2",
                id="civitai-worker-assets",
                version="sam_vit_b_01ec64",
                ecosystem="other",
                type="other",
                format="pth",
            ),
        ),
        (
            "urn:air:oci:image:ghcr:civitai/training-toolkit@sha256:abc",
            AirRef(source="ghcr", id="civitai/training-toolkit", version="sha256:abc", ecosystem="oci", type="image"),
        ),
    ],
)
def test_an_air_urn_is_read_in_full_and_in_short(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        " hf:org/repo",
        "hf:org",
        "hf:org/",
        "hf:org/repo@",
        "hf:org/..",
        "hf:org/repo/../../etc",
        "hf:org//repo",
        "hf:o rg/repo",
        "urn:air:sd1:lora:civitai:abc@1",
        "urn:air:sd1:lora:unknown:1@2",
        "urn:air:a:b:c:d:e:f",
        "urn:air:sd1:lora:huggingface:norepo@1",
        "s3://b",
        "s3://bucket/../x",
        "s3://UPPER/key",
        "https://",
        "https://user:secret@example.org/x",
        "ftp://example.org/x",
        "gs://bucket/key",
        "Not A Name",
        "a\nb/c",
        "x" * 3000,
    ],
)
def test_what_is_no_reference_is_refused_with_its_text(text):
    with pytest.raises(InvalidField) as caught:
        parse(text)
    assert caught.value.field == "reference"


@given(st.text(max_size=80))
def test_any_text_is_either_a_reference_or_an_invalid_field(text):
    try:
        reference = parse(text)
    except InvalidField:
        return
    assert str(reference)


_NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,12}", fullmatch=True)


@given(_NAMES, _NAMES, st.one_of(st.just(""), _NAMES, st.just("refs/pr/7")), st.lists(_NAMES, max_size=3))
def test_a_hub_reference_survives_being_written_and_read(org, repo, revision, folders):
    reference = HubRef(repo=f"{org}/{repo}", revision=revision, subfolder="/".join(folders))
    assert parse(str(reference)) == reference


@pytest.mark.parametrize("path", ["../x", "a/../b", "/x", "a//b", "a\\b", "a/.", "", "a\0b", "a/" + "n" * 300])
def test_a_path_that_leaves_its_folder_is_not_safe(path):
    assert not is_safe_path(path)
