"""Models from a hub and a Civitai-like site: what is fetched, what is shared, what a view looks like."""

import hashlib
import json
import random

import pytest

import services.weights.planning.planner as planner
import services.weights.store.keeping as keeping
from fanlight.errors import FailedPrecondition, InvalidField, NotFound
from services.weights.errors import TokenRefused
from services.weights.references.tensors import BadHeader
from tests.fakes.range_server import Fault
from tests.fakes.weight_sites import COMMIT, put_civitai_version, put_repository, safetensors
from tests.fakes.weight_stores import open_store

_chance = random.Random(5)


def _noise(count: int) -> bytes:
    return _chance.randbytes(count)


UNET, TEXT, DECODER, ENCODER, EMA = _noise(86_000), _noise(12_300), _noise(50_000), _noise(34_000), _noise(86_000)
REPOSITORY = {
    "model_index.json": b"{}",
    "unet/config.json": b'{"a": 1}',
    "unet/diffusion_pytorch_model.bin": _noise(172_000),
    "unet/diffusion_pytorch_model.safetensors": safetensors({"w": _noise(172_000)}),
    "unet/diffusion_pytorch_model.fp16.safetensors": safetensors({"w": UNET}),
    "vae/config.json": b"{}",
    "vae/diffusion_pytorch_model.fp16.safetensors": safetensors({"decoder.w": DECODER, "encoder.w": ENCODER}),
    "safety_checker/model.safetensors": safetensors({"s": _noise(60_000)}),
    "README.md": b"# hello",
}


def _checkpoint(unet: bytes, *, with_ema: bool = False) -> bytes:
    tensors = {
        "model.diffusion_model.w": unet,
        "cond_stage_model.w": TEXT,
        "first_stage_model.decoder.w": DECODER,
        "first_stage_model.encoder.w": ENCODER,
    }
    return safetensors({**tensors, "model_ema.w": EMA} if with_ema else tensors)


async def test_who_has_an_older_answer_does_not_wait_long_for_a_hub_in_trouble(server, settings, monkeypatch):
    monkeypatch.setattr(planner, "STALE_WAIT_S", 0.2)
    put_repository(server, "org/m", {"model.safetensors": safetensors({"a": b"1234"})})
    async with open_store(settings()) as store:
        before = await store.fetch("hf:org/m", store.selection())
    server.faults["/api/models/org/m/revision/main"] = [Fault(status=503, retry_after="100")] * 9
    async with open_store(settings()) as store:
        assert (await store.fetch("hf:org/m", store.selection())).path == before.path


async def test_a_repository_becomes_a_view_with_the_names_that_loaders_look_for(server, store):
    put_repository(server, "org/sd", REPOSITORY)
    path = await store.ensure("hf:org/sd", "text2img")
    assert path == store.objects.views / "org/sd"
    files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert files == {
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    body = (path / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    assert body == REPOSITORY["unet/diffusion_pytorch_model.fp16.safetensors"]


async def test_only_the_planned_bytes_go_over_the_link(server, store):
    put_repository(server, "org/sd", REPOSITORY)
    (plan,) = await store.plan(["hf:org/sd"], store.selection("text2img"))
    api = server.total_sent()
    fetched = await store.fetch("hf:org/sd", store.selection("text2img"))
    assert fetched.downloaded_bytes == plan.fetch_bytes
    assert server.total_sent() - 2 * api <= plan.fetch_bytes + len(plan.files)
    assert plan.manifest.revision == COMMIT


async def test_without_a_network_what_is_held_is_found_again(server, store):
    put_repository(server, "org/sd", REPOSITORY)
    path = await store.ensure("hf:org/sd", "text2img")
    server.faults["/api/models/org/sd/revision/main"] = [Fault(status=500)]
    assert await store.ensure("hf:org/sd", "text2img") == path
    (plan,) = await store.plan(["hf:org/sd"], store.selection("text2img"))
    assert plan.fetch_bytes == 0


async def test_a_file_and_a_folder_of_a_repository_can_be_named(server, store):
    put_repository(server, "org/sd", REPOSITORY)
    file = await store.ensure("hf:org/sd/unet/diffusion_pytorch_model.safetensors")
    assert file.read_bytes() == REPOSITORY["unet/diffusion_pytorch_model.safetensors"]
    folder = await store.ensure("hf:org/sd/unet")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]


async def test_a_private_repository_takes_the_token_which_stays_with_the_hub(server, settings):
    put_repository(server, "org/sd", REPOSITORY, token="hf_secret")
    async with open_store(settings()) as store:
        with pytest.raises(TokenRefused, match="hf:org/sd"):
            await store.ensure("hf:org/sd", "text2img")
    async with open_store(settings(hf_token="hf_secret")) as store:
        await store.ensure("hf:org/sd", "text2img")
    assert any(s.path.startswith("/cdn/") for s in server.seen)
    assert not any(s.authorization for s in server.seen if s.path.startswith("/cdn/"))


async def test_a_repository_that_is_not_there_is_named(server, store):
    with pytest.raises(NotFound, match="hf:no/such"):
        await store.ensure("hf:no/such")


async def test_a_repository_whose_paths_leave_the_folder_is_refused(server, store):
    row = {"rfilename": "../../etc/passwd.safetensors", "size": 3}
    server.put_json("/api/models/org/evil/revision/main", {"sha": COMMIT, "siblings": [row]})
    with pytest.raises(InvalidField, match="hf:org/evil"):
        await store.ensure("hf:org/evil")


async def test_a_repository_of_pickles_is_refused_by_name(server, store):
    put_repository(server, "org/old", {"config.json": b"{}", "diffusion_pytorch_model.bin": _noise(5000)})
    with pytest.raises(FailedPrecondition, match=r"hf:org/old.*pickle"):
        await store.ensure("hf:org/old")


@pytest.mark.parametrize("body", [b"\xff" * 8 + b"x" * 2000, safetensors({"a": b"1" * 2000})[:-5], b"<html>" * 500])
async def test_a_file_that_is_no_sound_safetensors_file_is_not_kept(server, store, body):
    put_repository(server, "org/bad", {"config.json": b"{}", "diffusion_pytorch_model.safetensors": body})
    with pytest.raises(BadHeader):
        await store.ensure("hf:org/bad")
    assert not list(store.objects.views.rglob("*.safetensors"))
    sha256 = hashlib.sha256(body).hexdigest()
    assert not list(store.objects.parts.glob(f"{sha256}*"))
    assert store.objects.index.find(sha256) is None


async def test_a_civitai_version_is_found_by_its_air_urn_and_by_number(server, store):
    lora = safetensors({"lora_up.w": _noise(5000)})
    put_civitai_version(server, 82098, 87153, {"style.safetensors": lora})
    path = await store.ensure("urn:air:sd1:lora:civitai:82098@87153")
    assert path.name == "style.safetensors"
    assert path.read_bytes() == lora
    assert await store.ensure("civitai:82098") == path


async def test_a_civitai_file_is_taken_by_its_id_and_safetensors_else(server, store):
    files = {"a.ckpt": _noise(2000), "b.safetensors": safetensors({"w": _noise(3000)})}
    put_civitai_version(server, 1, 2, files)
    assert (await store.ensure("civitai:1@2")).name == "b.safetensors"
    with pytest.raises(FailedPrecondition, match="pickle"):
        await store.ensure("civitai:1@2+1")


async def test_of_the_next_checkpoint_only_what_is_new_is_fetched_where_another_node_published_digests(
    server, settings, tmp_path
):
    put_repository(server, "org/a", {"a.safetensors": _checkpoint(UNET)})
    put_repository(server, "org/b", {"b.safetensors": _checkpoint(_noise(86_000))})
    catalog_dir = tmp_path / "catalog"
    catalog_dir.mkdir()
    async with open_store(settings(dir=tmp_path / "another node")) as another:
        await another.ensure("hf:org/b/b.safetensors", "text2img")
        tables = {sha: table.to_json() for sha, table in another.objects.tables_of("org/b").items()}
    (catalog_dir / "digests.json").write_text(json.dumps({"tensor_tables": tables}))
    async with open_store(settings(catalog_dir=catalog_dir)) as store:
        first = await store.fetch("hf:org/a/a.safetensors", store.selection("text2img"))
        second = await store.fetch("hf:org/b/b.safetensors", store.selection("text2img"))
    assert second.downloaded_bytes == 86_000
    assert {p.name for p in second.path.iterdir()} == {
        "unet.safetensors",
        "text_encoder.safetensors",
        "vae_decoder.safetensors",
    }
    decoders = [(fetched.path / "vae_decoder.safetensors").resolve() for fetched in (first, second)]
    assert decoders[0] == decoders[1]


async def test_a_checkpoint_fetched_whole_for_a_pipeline_is_kept_as_its_parts(server, store):
    put_repository(server, "org/a", {"a.safetensors": _checkpoint(UNET, with_ema=True)})
    folder = await store.ensure("hf:org/a/a.safetensors", "text2img")
    assert {p.name for p in folder.iterdir()} == {
        "unet.safetensors",
        "text_encoder.safetensors",
        "vae_decoder.safetensors",
    }
    again = await store.fetch("hf:org/a/a.safetensors", store.selection("img2img"))
    assert again.downloaded_bytes == len(ENCODER)
    assert (again.path / "vae_encoder.safetensors").exists()


async def test_parts_in_the_making_are_not_taken_for_abandoned_downloads(server, store, monkeypatch):
    def compose(objects, *arguments):
        made = keeping_compose(objects, *arguments)
        objects.collect()
        return made

    keeping_compose = keeping.compose
    monkeypatch.setattr(keeping, "compose", compose)
    put_repository(server, "org/a", {"a.safetensors": _checkpoint(UNET)})
    path = await store.ensure("hf:org/a/a.safetensors", "text2img")
    assert (path / "unet.safetensors").read_bytes().endswith(UNET)


async def test_a_checkpoint_whose_parts_do_not_fit_beside_it_stays_whole(server, settings):
    body = _checkpoint(UNET)
    put_repository(server, "org/a", {"a.safetensors": body})
    async with open_store(settings(budget_bytes=len(body) * 3 // 2)) as store:
        fetched = await store.fetch("hf:org/a/a.safetensors", store.selection("text2img"))
        again = await store.fetch("hf:org/a/a.safetensors", store.selection("text2img"))
    assert fetched.downloaded_bytes == len(body)
    assert again.downloaded_bytes == 0
    assert fetched.path.read_bytes() == body


async def test_two_components_that_differ_in_their_header_only_are_kept_once(server, store):
    weights = {"w": TEXT}
    for name, metadata in (("a", None), ("b", {"format": "pt", "note": "x" * 50})):
        body = safetensors(weights, metadata=metadata)
        put_repository(server, f"org/{name}", {"config.json": b"{}", "model.safetensors": body})
    one, two = [await store.ensure(f"hf:org/{name}") / "model.safetensors" for name in "ab"]
    assert one.resolve() == two.resolve()
    again = await store.fetch("hf:org/b", store.selection())
    assert again.downloaded_bytes == 0


async def test_an_index_that_is_lost_is_made_again_from_what_lies_there(server, settings, tmp_path):
    put_repository(server, "org/sd", REPOSITORY)
    async with open_store(settings()) as store:
        await store.ensure("hf:org/sd", "text2img")
    for path in (tmp_path / "store").glob("index.sqlite*"):
        path.unlink()
    async with open_store(settings()) as store:
        fetched = await store.fetch("hf:org/sd", store.selection("text2img"))
    assert fetched.downloaded_bytes < 100


async def test_a_local_path_is_used_where_it_lies(store, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_bytes(safetensors({"w": b"123"}))
    assert await store.ensure(str(tmp_path / "mine")) == tmp_path / "mine"
    (plan,) = await store.plan([str(tmp_path / "mine")], store.selection())
    assert plan.fetch_bytes == 0
    with pytest.raises(NotFound, match="nowhere"):
        await store.ensure(str(tmp_path / "nowhere"))


async def test_a_lora_stands_where_the_a1111_web_ui_looks_until_it_is_removed(server, store, tmp_path):
    body = safetensors({"lora_unet_x.lora_up.weight": b"u" * 3000})
    put_civitai_version(server, 82098, 87153, {"style.safetensors": body})
    await store.ensure("civitai:82098@87153")
    link = tmp_path / "store/a1111/models/Lora/style.safetensors"
    assert link.read_bytes() == body
    await store.run(store.objects.remove_model, "civitai/82098-87153")
    assert not link.is_symlink()
