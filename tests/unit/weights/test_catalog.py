import json

import pytest

from fanlight.errors import FailedPrecondition, NotFound
from services.weights.planning.plan import Holdings, make_plan
from services.weights.planning.selection import Selection
from services.weights.references.catalog import shipped, with_folder
from services.weights.references.references import parse


@pytest.fixture
def catalog():
    return shipped()


def _wish(catalog, pipeline=""):
    return Selection(pipeline=pipeline, pinned_pickles=catalog.pinned_pickles())


def test_every_entry_can_be_planned_and_every_source_is_a_reference(catalog):
    for entry in catalog.entries.values():
        plan = make_plan(entry, _wish(catalog), Holdings())
        assert plan.fetch_bytes > 0
        for item in plan.files:
            assert item.file.sources
            assert all(parse(source) for source in item.file.sources)


def test_every_profile_names_entries_only(catalog):
    for name in catalog.profiles:
        assert all(catalog.require(entry) for entry in catalog.expand([name]))


def test_a_repository_and_a_civitai_version_are_found_by_their_own_names(catalog):
    assert catalog.find(parse("runwayml/stable-diffusion-v1-5")) is catalog.entries["sd15"]
    assert catalog.find(parse("urn:air:sd1:checkpoint:civitai:4384@128713")) is catalog.entries["dreamshaper-8"]
    assert catalog.find(parse("some/other")) is None
    assert catalog.find(parse("catalog:controlnet/canny")) is catalog.entries["controlnet-canny"]


def test_another_revision_is_not_the_entry(catalog):
    assert catalog.find(parse("runwayml/stable-diffusion-v1-5@abc")) is None


def test_a_name_that_is_not_there_is_not_found_and_the_others_are_named(catalog):
    with pytest.raises(NotFound, match="sd15"):
        catalog.require("sd99")


def test_the_sd15_repository_shrinks_to_what_makes_an_image(catalog):
    entry = catalog.require("sd15")
    plan = make_plan(entry, _wish(catalog, "text2img"), Holdings())
    assert 47.2e9 < entry.total_bytes < 47.3e9
    assert plan.fetch_bytes == 2_134_194_125
    assert entry.total_bytes / plan.fetch_bytes > 22


def test_the_fourteen_controlnets_shrink_to_a_sixth(catalog):
    names = catalog.expand(["controlnets"])
    plans = [make_plan(catalog.require(name), _wish(catalog), Holdings()) for name in names if name != "controlnet-qr"]
    assert len(plans) == 14
    assert 10.1e9 < sum(plan.fetch_bytes for plan in plans) < 10.2e9


def test_tile_and_depth_carry_their_caveats(catalog):
    assert "pickle" in catalog.require("controlnet-tile").caveats[0]
    assert "not proved" in catalog.require("controlnet-depth").caveats[0]


def test_the_annotators_pickles_are_allowed_because_they_are_pinned(catalog):
    plan = make_plan(catalog.require("annotator-openpose"), _wish(catalog), Holdings())
    assert [item.link for item in plan.files] == ["body_pose_model.pth", "hand_pose_model.pth", "facenet.pth"]
    with pytest.raises(FailedPrecondition, match="pickle"):
        make_plan(catalog.require("annotator-openpose"), Selection(), Holdings())


def test_an_operators_folder_adds_entries_and_tensor_tables(catalog, tmp_path):
    sha = "0" * 64
    entry = {"name": "mine", "view": "me/mine", "kind": "lora", "is_chosen": True, "sources": ["hf:me/mine"]}
    table = {"header_bytes": 8, "tensors": [["a", "U8", [2], 8, 10, "1" * 64]]}
    files = [{"path": "a.safetensors", "bytes": 10, "sha256": sha}]
    document = {"entries": [{**entry, "files": files}], "tensor_tables": {sha: table}}
    (tmp_path / "mine.json").write_text(json.dumps(document))
    found = with_folder(catalog, tmp_path).require("mine")
    assert found.files[0].sources == ("hf:me/mine/a.safetensors",)
    assert found.files[0].tensors is not None
    assert found.files[0].tensors.has_digests


def test_a_broken_catalog_file_is_named(catalog, tmp_path):
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(FailedPrecondition, match=r"bad\.json"):
        with_folder(catalog, tmp_path)


def test_an_operators_folder_that_is_not_there_is_named(catalog, tmp_path):
    with pytest.raises(FailedPrecondition, match="none is not a folder"):
        with_folder(catalog, tmp_path / "none")
