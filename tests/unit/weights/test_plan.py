import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanlight.errors import FailedPrecondition, InvalidField
from services.weights.planning.plan import Holdings, make_plan, plan_to_json
from services.weights.planning.selection import PIPELINES, Selection
from services.weights.references.manifest import (
    Manifest,
    TensorEntry,
    TensorTable,
    WeightFile,
    manifest_from_json,
    manifest_to_json,
)
from services.weights.references.tensors import component_key


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _manifest(*paths: str, **values) -> Manifest:
    files = tuple(WeightFile(path=path, size_bytes=100, sha256=_sha(path)) for path in paths)
    return Manifest(reference="hf:a/b", view="a/b", files=files, **values)


def _table(sizes: dict[str, int], header_bytes: int = 80) -> TensorTable:
    at, tensors = header_bytes, []
    for name, size in sizes.items():
        entry = TensorEntry(name=name, dtype="U8", shape=(size,), begin=at, end=at + size, sha256=_sha(name))
        tensors.append(entry)
        at += size
    return TensorTable(header_bytes=header_bytes, tensors=tuple(tensors))


def _checkpoint(sizes: dict[str, int], path: str = "m.safetensors") -> Manifest:
    table = _table(sizes)
    size = table.tensors[-1].end
    file = WeightFile(path=path, size_bytes=size, sha256=_sha(path), tensors=table)
    return Manifest(reference="hf:a/b", view="a/b", files=(file,), is_chosen=True)


WHOLE = {
    "model.diffusion_model.in": 860,
    "cond_stage_model.w": 123,
    "first_stage_model.decoder.w": 50,
    "first_stage_model.encoder.w": 34,
    "model_ema.in": 860,
}


def test_safetensors_are_preferred_and_fp16_before_fp32():
    plan = make_plan(
        _manifest(
            "model_index.json",
            "unet/diffusion_pytorch_model.bin",
            "unet/diffusion_pytorch_model.fp16.bin",
            "unet/diffusion_pytorch_model.safetensors",
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "unet/diffusion_pytorch_model.non_ema.safetensors",
            "text_encoder/pytorch_model.bin",
            "text_encoder/model.safetensors",
        ),
        Selection(),
        Holdings(),
    )
    assert {i.file.path for i in plan.files} == {
        "model_index.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.safetensors",
    }
    assert all(s.why for s in plan.skipped)


def test_fp32_is_taken_when_it_is_asked_for():
    manifest = _manifest(
        "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors", "config.json"
    )
    plan = make_plan(manifest, Selection(precision="fp32"), Holdings())
    assert "diffusion_pytorch_model.safetensors" in {i.file.path for i in plan.files}


def test_the_view_has_the_names_that_loaders_look_for():
    manifest = _manifest("config.json", "diffusion_pytorch_model.fp16.safetensors")
    links = {i.link for i in make_plan(manifest, Selection(), Holdings()).files}
    assert links == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_all_shards_of_the_chosen_copy_are_taken():
    shards = [f"unet/diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    plan = make_plan(
        _manifest("model_index.json", "unet/diffusion_pytorch_model.bin", *shards), Selection(), Holdings()
    )
    assert {i.link for i in plan.files} == {"model_index.json", *shards}


def test_other_formats_and_images_are_skipped_with_reasons():
    manifest = _manifest(
        "config.json", "model.safetensors", "model.onnx", "flax_model.msgpack", "sample.png", "README.md"
    )
    plan = make_plan(manifest, Selection(), Holdings())
    reasons = {s.path: s.why for s in plan.skipped}
    assert reasons["model.onnx"] == "another format: ONNX"
    assert set(reasons) == {"model.onnx", "flax_model.msgpack", "sample.png", "README.md"}


def test_the_safety_checker_comes_only_when_it_is_on():
    manifest = _manifest("model_index.json", "unet/m.safetensors", "safety_checker/model.safetensors")
    assert len(make_plan(manifest, Selection(), Holdings()).files) == 2
    assert len(make_plan(manifest, Selection(safety_checker=True), Holdings()).files) == 3


def test_a_repository_of_pickles_is_refused_unless_allowed_or_pinned():
    manifest = _manifest("config.json", "diffusion_pytorch_model.bin")
    with pytest.raises(FailedPrecondition, match=r"hf:a/b.*pickle"):
        make_plan(manifest, Selection(), Holdings())
    assert make_plan(manifest, Selection(allow_pickle=True), Holdings()).fetch_bytes == 200
    pinned = frozenset({_sha("diffusion_pytorch_model.bin")})
    assert make_plan(manifest, Selection(pinned_pickles=pinned), Holdings()).fetch_bytes == 200


def test_a_component_that_has_only_a_pickle_is_not_left_out_in_silence():
    with pytest.raises(FailedPrecondition, match=r"unet/diffusion_pytorch_model\.bin"):
        make_plan(
            _manifest("model_index.json", "unet/diffusion_pytorch_model.bin", "vae/m.safetensors"),
            Selection(),
            Holdings(),
        )


def test_an_empty_repository_is_refused():
    with pytest.raises(FailedPrecondition, match="no weights"):
        make_plan(_manifest("README.md"), Selection(), Holdings())


def test_a_repository_of_several_checkpoints_asks_for_a_name():
    with pytest.raises(FailedPrecondition, match="name one"):
        make_plan(_manifest("v7.safetensors", "v8.safetensors"), Selection(), Holdings())


def test_what_is_held_is_not_fetched_again():
    manifest = _manifest("config.json", "diffusion_pytorch_model.safetensors")
    holdings = Holdings(objects=frozenset({_sha("diffusion_pytorch_model.safetensors")}))
    plan = make_plan(manifest, Selection(), holdings)
    assert (plan.fetch_bytes, plan.held_bytes) == (100, 100)


def test_a_checkpoint_with_digests_gives_only_the_parts_that_a_pipeline_needs():
    plan = make_plan(_checkpoint(WHOLE), Selection(pipeline="text2img"), Holdings())
    assert {i.link: i.size_bytes for i in plan.files} == {
        "m/unet.safetensors": 860,
        "m/text_encoder.safetensors": 123,
        "m/vae_decoder.safetensors": 50,
    }
    assert {s.path: s.size_bytes for s in plan.skipped} == {
        "m.safetensors#ema": 860,
        "m.safetensors#vae_encoder": 34,
        "m.safetensors#header": 80,
    }


def test_a_pipeline_that_encodes_gets_the_encoder_too():
    plan = make_plan(_checkpoint(WHOLE), Selection(pipeline="img2img"), Holdings())
    assert plan.fetch_bytes == 860 + 123 + 50 + 34


def test_of_the_next_checkpoint_only_the_unet_is_fetched_when_the_rest_is_held():
    first = make_plan(_checkpoint(WHOLE), Selection(pipeline="text2img"), Holdings())
    components = frozenset(component_key(i.tensors) for i in first.files if "unet" not in i.link)
    second = {("next." + name if "diffusion" in name else name): size for name, size in WHOLE.items()}
    second = {name.replace("next.model", "model") + ("2" if "next" in name else ""): s for name, s in second.items()}
    plan = make_plan(
        _checkpoint(second, "n.safetensors"), Selection(pipeline="text2img"), Holdings(components=components)
    )
    assert plan.fetch_bytes == 860
    assert plan.held_bytes == 173


def test_a_file_of_which_tensors_are_held_is_rebuilt_from_them():
    holdings = Holdings(tensors=frozenset({_sha("cond_stage_model.w")}))
    (item,) = make_plan(_checkpoint(WHOLE), Selection(), holdings).files
    assert item.is_rebuilt
    assert item.held_bytes == 123
    assert item.fetch_bytes == item.size_bytes - 123


def test_a_vae_gives_its_decoder_only_where_nothing_is_encoded():
    table = _table({"decoder.w": 50, "encoder.w": 34, "post_quant_conv.w": 1, "quant_conv.w": 2})
    path = "vae/diffusion_pytorch_model.fp16.safetensors"
    file = WeightFile(path=path, size_bytes=table.tensors[-1].end, sha256=_sha("v"), tensors=table)
    manifest = Manifest(reference="hf:a/b", view="a/b", files=(file,), is_chosen=True)
    assert make_plan(manifest, Selection(pipeline="text2img"), Holdings()).fetch_bytes == 51
    assert make_plan(manifest, Selection(pipeline="img2img"), Holdings()).fetch_bytes == file.size_bytes


def test_without_digests_the_whole_file_is_fetched():
    plan = make_plan(_manifest("config.json", "m.safetensors"), Selection(pipeline="text2img"), Holdings())
    assert plan.fetch_bytes == 200


def test_an_unknown_pipeline_is_an_invalid_field():
    with pytest.raises(InvalidField, match="text2img"):
        Selection(pipeline="video")


_FOLDERS = st.sampled_from(["", "unet/", "vae/", "text_encoder/", "safety_checker/", "onnx/", "tokenizer/"])
_STEMS = st.sampled_from(["model", "diffusion_pytorch_model", "config", "pytorch_model", "model_index"])
_VARIANTS = st.sampled_from(["", ".fp16", ".non_ema", ".bf16"])
_ENDINGS = st.sampled_from([".safetensors", ".bin", ".json", ".ckpt", ".onnx", ".png", ".txt"])
_PATHS = st.builds(lambda *parts: "".join(parts), _FOLDERS, _STEMS, _VARIANTS, _ENDINGS)


@given(st.sets(_PATHS, min_size=1), st.sampled_from(["", *PIPELINES]), st.booleans(), st.data())
def test_fetched_held_and_skipped_bytes_are_all_bytes_and_each_path_stands_once(paths, pipeline, checker, data):
    manifest = _manifest(*sorted(paths))
    held = data.draw(st.sets(st.sampled_from([_sha(p) for p in sorted(paths)])))
    selection = Selection(pipeline=pipeline, safety_checker=checker, allow_pickle=True)
    try:
        plan = make_plan(manifest, selection, Holdings(objects=frozenset(held)))
    except FailedPrecondition:
        return
    assert plan.fetch_bytes + plan.held_bytes + plan.skipped_bytes == manifest.total_bytes
    named = [i.file.path for i in plan.files] + [s.path for s in plan.skipped]
    assert sorted(named) == sorted(paths)
    assert make_plan(manifest, selection, Holdings(objects=frozenset(held))) == plan


_PARTS = st.sampled_from([f"{name.rsplit('.', 1)[0]}.{i}" for name in WHOLE for i in range(4)])


@given(st.dictionaries(_PARTS, st.integers(0, 900), min_size=1), st.sampled_from(["", *PIPELINES]), st.data())
def test_with_tensors_too_no_byte_is_counted_twice_or_lost(sizes, pipeline, data):
    manifest = _checkpoint(sizes)
    held = frozenset(data.draw(st.sets(st.sampled_from([_sha(name) for name in sorted(sizes)]))))
    plan = make_plan(manifest, Selection(pipeline=pipeline), Holdings(tensors=held))
    assert plan.fetch_bytes + plan.held_bytes + plan.skipped_bytes == manifest.total_bytes
    assert all(t.sha256 not in held for i in plan.files for t in i.missing)


def test_the_report_has_the_promised_keys():
    data = plan_to_json([make_plan(_manifest("config.json", "m.safetensors", "m.bin"), Selection(), Holdings())])
    assert {"fetch_bytes", "held_bytes", "skipped_bytes", "files", "skipped"} <= set(data)
    assert {"path", "bytes", "sha256", "source", "why"} <= set(data["files"][0])
    assert set(data["skipped"][0]) == {"path", "bytes", "why"}
    assert set(data["seconds"]) == {"25", "100", "300", "1000"}


def test_a_manifest_survives_being_written_and_read():
    manifest = _checkpoint(WHOLE)
    assert manifest_from_json(manifest_to_json(manifest)) == manifest


@pytest.mark.parametrize("path", ["../x", "/x", "a//b"])
def test_a_manifest_whose_paths_leave_the_folder_is_refused(path):
    with pytest.raises(InvalidField, match="escapes"):
        _manifest(path)
