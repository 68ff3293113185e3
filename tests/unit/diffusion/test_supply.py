"""What a request names is fetched before it is parsed, where that is allowed, and kept while it is generated."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from fanlight.common.v1 import common_pb2
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import FailedPrecondition, FanlightError, NodeFault, NotFound
from services.diffusion.models.catalog import ModelCatalog
from services.diffusion.models.entries import controlnet_id
from services.diffusion.supply import FetchMode, RemoteModels, Supply
from services.diffusion.wire import capable_models, models_to_proto
from services.weights.errors import DiskFull, SourceFailed
from services.weights.references.catalog import shipped
from services.weights.store.index import HeldModel
from tests.fakes.references import FakeStore

Request = diffusion_pb2.GenerateRequest


@pytest.fixture
def supplied(models):
    """A catalog, its store and its supply, by what may be fetched."""
    readers = ThreadPoolExecutor(1)

    def supply(fetch, own=None, default="off", is_offline=False, **paths):
        catalog = ModelCatalog()
        store = FakeStore({"sd15": models / "model", "hf:some/one": models / "model", **paths})
        remote = RemoteModels(catalog=shipped(), fetch=fetch, is_offline=is_offline)
        made = Supply(catalog, store, remote, readers=readers, checker=own, check_by_default=default)
        return catalog, store, made

    yield supply
    readers.shutdown()


async def test_a_checkpoint_of_the_catalog_is_there_while_the_request_runs(supplied):
    catalog, store, supply = supplied(FetchMode.CATALOG)
    heard = []
    async with supply.provided(Request(model="sd15"), heard.append):
        entry = catalog.checkpoint("sd15")
        assert (entry.id, entry.reference, store.in_use) == ("sd15", "sd15", ["sd15"])
    assert store.in_use == []
    assert store.asked == [("sd15", "text2img")]
    assert [(each.done_bytes, each.total_bytes) for each in heard] == [(1, 2)]


async def test_a_lora_that_a_prompt_names_is_fetched_too(supplied, tmp_path):
    lora = tmp_path / "style.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(4, 8)}, lora)
    catalog, store, supply = supplied(FetchMode.ANY, **{"some/style": lora})
    request = Request(model="sd15", prompt="a fox <lora:some/style:0.7>")
    async with supply.provided(request, lambda progress: None):
        assert catalog.lora("some/style", catalog.checkpoint("sd15")).path == lora
        assert store.in_use == ["sd15", "some/style"]


async def test_an_image_to_start_from_asks_for_the_vaes_encoder_too(supplied):
    _, store, supply = supplied(FetchMode.CATALOG)
    request = Request(model="sd15", image=common_pb2.ImageSource(data=b"x"))
    async with supply.provided(request, lambda progress: None):
        assert store.asked == [("sd15", "img2img")]


async def test_the_catalog_alone_is_asked_unless_any_reference_is_allowed(supplied):
    catalog, store, supply = supplied(FetchMode.CATALOG)
    async with supply.provided(Request(model="hf:some/one"), lambda progress: None):
        assert store.asked == []
        with pytest.raises(NotFound):
            catalog.checkpoint("hf:some/one")
    catalog, store, supply = supplied(FetchMode.ANY)
    async with supply.provided(Request(model="hf:some/one"), lambda progress: None):
        assert catalog.checkpoint("hf:some/one").reference == "hf:some/one"


@pytest.mark.parametrize("name", ["/etc/passwd", "file:///x", "~/x", "https://host/x.safetensors", "nothing-known"])
async def test_no_path_of_this_machine_and_no_unnamed_server_is_read_on_a_clients_word(name, supplied):
    _, store, supply = supplied(FetchMode.ANY)
    async with supply.provided(Request(model=name), lambda progress: None):
        assert store.asked == []


async def test_with_fetching_off_nothing_is_asked_for_or_offered(supplied):
    _, store, supply = supplied(FetchMode.OFF)
    async with supply.provided(Request(model="sd15"), lambda progress: None):
        assert store.asked == []
    assert supply.remote_models() == []


async def test_what_cannot_be_fetched_is_an_error_that_names_field_and_reference(supplied):
    _, _, supply = supplied(FetchMode.CATALOG)
    with pytest.raises(NodeFault, match="sdxl") as caught:
        async with supply.provided(Request(model="sdxl"), lambda progress: None):
            pass
    assert caught.value.field == "model"


async def test_what_cannot_be_fetched_names_the_source_or_else_the_model(supplied):
    _, store, supply = supplied(FetchMode.ANY)
    failures = {"hf:a/away": SourceFailed("hub.test cannot be reached").of_part("source:hub.test"), "hf:a/b": None}

    @contextlib.asynccontextmanager
    async def obtain(reference, pipeline="", *, report):
        raise failures[reference] or DiskFull("the disk is full")
        yield

    store.obtain = obtain
    for name, part in {"hf:a/away": "source:hub.test", "hf:a/b": "checkpoint:hf:a/b"}.items():
        with pytest.raises(FanlightError) as caught:
            async with supply.provided(Request(model=name), lambda progress: None):
                pass
        assert caught.value.part == part


async def test_a_part_is_named_as_the_request_names_its_model(supplied, models):
    _, _, supply = supplied(FetchMode.ANY, **{"hf:net/canny": models / "controlnet-canny"})
    request = Request(model="hf:some/one", controls=[diffusion_pb2.Control(controlnet="hf:net/canny")])
    async with supply.provided(request, lambda progress: None):
        assert supply.part_as_named(request, "controlnet:canny") == "controlnet:hf:net/canny"
        assert supply.part_as_named(request, "checkpoint:hf:some/one") == "checkpoint:hf:some/one"
        assert supply.part_as_named(request, "device:cpu") == "device:cpu"


async def test_a_reference_to_another_kind_of_model_is_refused(supplied, models):
    _, _, supply = supplied(FetchMode.ANY, **{"hf:net/canny": models / "controlnet-canny"})
    with pytest.raises(FailedPrecondition, match="no checkpoint"):
        async with supply.provided(Request(model="hf:net/canny"), lambda progress: None):
            pass


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("canny", "controlnet-canny"),
        ("lllyasviel/control_v11f1p_sd15_depth", "controlnet-depth"),
        ("control_v11p_sd15_normalbae [316696f1]", "controlnet-normal"),
        ("control_v11p_sd15s2_lineart_anime", "controlnet-lineart_anime"),
        ("control_v11e_sd15_shuffle", "controlnet-shuffle"),
        ("control_v11f1e_sd15_tile", "controlnet-tile"),
        ("DionTimmer/controlnet_qrcode", "controlnet-qr"),
        ("qr", "controlnet-qr"),
    ],
)
def test_every_controlnet_goes_by_short_id_repository_and_a1111s_name(name, reference):
    remote = RemoteModels(catalog=shipped(), fetch=FetchMode.CATALOG)
    assert remote.reference(name, "controlnet", "sd1") == reference
    assert remote.reference(name, "controlnet", "sdxl") == ""


def test_all_14_controlnets_and_the_qr_one_are_offered_with_the_checkpoints_they_fit(supplied):
    catalog, _, supply = supplied(FetchMode.CATALOG)
    offered = {(model.kind, model.id): model for model in models_to_proto(catalog, remote=supply.remote_models())}
    nets = "canny mlsd depth normal seg inpaint lineart lineart_anime openpose scribble softedge shuffle ip2p tile qr"
    for name in nets.split():
        assert offered["controlnet", name].family == "sd1"
        assert offered["controlnet", name].residency == diffusion_pb2.Model.RESIDENCY_REMOTE
    assert offered["checkpoint", "sd15"].family == "sd1"
    assert (offered["checkpoint", "sd15"].width_px, offered["checkpoint", "sd15"].size_step_px) == (512, 8)
    assert (offered["checkpoint", "sdxl"].width_px, offered["checkpoint", "sdxl"].family) == (1024, "sdxl")
    assert "img2img" in offered["checkpoint", "sdxl"].pipelines
    assert offered["checkpoint", "sd15"].size_bytes < 2.5e9
    assert ("checkpoint", "starter") not in offered


def test_each_controlnet_tells_its_other_names(supplied):
    catalog, _, supply = supplied(FetchMode.CATALOG)
    models = models_to_proto(catalog, remote=supply.remote_models())
    nets = {model.id: model.aliases for model in models if model.kind == "controlnet"}
    assert {"lllyasviel/control_v11p_sd15_canny", "control_v11p_sd15_canny", "control_v11p_sd15_canny_fp16"} <= set(
        nets["canny"]
    )
    assert "qr_code" in nets["qr"]
    for short, aliases in nets.items():
        assert short == "depth-f1p-ldm" or len(aliases) > 3
        assert {controlnet_id(alias) for alias in aliases if not alias.startswith("controlnet-")} == {short}


def test_what_the_store_holds_is_on_disk(supplied):
    catalog, store, supply = supplied(FetchMode.CATALOG)
    store.held = [HeldModel(name="a/b", size_bytes=1, is_pinned=False, used_s=0, references=("sd15",))]
    offered = {model.id: model for model in models_to_proto(catalog, remote=supply.remote_models())}
    assert offered["sd15"].residency == diffusion_pb2.Model.RESIDENCY_DISK
    assert offered["sdxl"].residency == diffusion_pb2.Model.RESIDENCY_REMOTE


async def test_a_fetched_model_is_listed_once(supplied):
    catalog, _, supply = supplied(FetchMode.CATALOG)
    async with supply.provided(Request(model="sd15"), lambda progress: None):
        pass
    listed = [model.id for model in models_to_proto(catalog, remote=supply.remote_models())]
    assert listed.count("sd15") == 1


async def test_what_a_worker_can_do_is_the_same_once_it_has_fetched_some_of_it(supplied):
    catalog, store, supply = supplied(FetchMode.CATALOG)

    def able() -> list[diffusion_pb2.Model]:
        return capable_models(catalog, digest_of=lambda entry: "", offers=supply.offers)

    before = able()
    assert {model.id for model in before} >= {"sd15", "sdxl", "canny"}
    assert {model.residency for model in before} == {diffusion_pb2.Model.RESIDENCY_UNSPECIFIED}
    layers = {model.id: model.text_encoder_layers for model in before if model.kind == "checkpoint"}
    # Those of the smaller text encoder of SDXL.
    assert (layers["sd15"], layers["sdxl"]) == (12, 12)
    store.held = [HeldModel(name="a/b", size_bytes=1, is_pinned=False, used_s=0, references=("sdxl",))]
    async with supply.provided(Request(model="sd15"), lambda progress: None):
        pass
    assert catalog.checkpoint("sd15").reference == "sd15"
    assert able() == before


def test_where_any_reference_may_be_fetched_each_kind_says_so(supplied):
    catalog, _, supply = supplied(FetchMode.ANY)
    offered = [model for model in models_to_proto(catalog, remote=supply.remote_models()) if model.id == "*"]
    assert [model.kind for model in offered] == ["checkpoint", "controlnet", "embedding", "lora", "vae"]
    assert {model.residency for model in offered} == {diffusion_pb2.Model.RESIDENCY_REMOTE}


@pytest.mark.parametrize(
    ("asked", "default", "is_fetched"),
    [("", "off", False), ("off", "flag", False), ("", "flag", True), ("flag", "off", True), ("block", "off", True)],
)
async def test_the_safety_checker_is_fetched_as_any_model_where_a_request_needs_it(
    asked, default, is_fetched, supplied, tmp_path
):
    _, store, supply = supplied(FetchMode.CATALOG, default=default, **{"safety-checker": tmp_path})
    assert supply.can_check
    assert supply.checker_folder() is None
    async with supply.provided(Request(model="sd15", safety_checker=asked), lambda progress: None):
        assert ("safety-checker" in store.in_use) is is_fetched
        assert supply.checker_folder() == (tmp_path if is_fetched else None)
    assert store.in_use == []


async def test_the_operators_own_safety_checker_is_used_and_none_is_fetched(supplied, tmp_path):
    for fetch in (FetchMode.OFF, FetchMode.ANY):
        _, store, supply = supplied(fetch, own=tmp_path)
        assert supply.can_check
        async with supply.provided(Request(model="sd15", safety_checker="block"), lambda progress: None):
            assert supply.checker_folder() == tmp_path
            assert "safety-checker" not in [reference for reference, _ in store.asked]


async def test_a_worker_that_could_not_get_a_safety_checker_offers_none(supplied, tmp_path):
    assert not supplied(FetchMode.OFF)[2].can_check
    _, store, supply = supplied(FetchMode.CATALOG, is_offline=True)
    assert not supply.can_check
    references = ("catalog:safety-checker",)
    store.held.append(HeldModel(name="checker", size_bytes=1, is_pinned=False, used_s=0.0, references=references))
    assert supply.can_check


async def test_a_safety_checker_that_cannot_be_fetched_names_its_field_and_its_need(supplied):
    _, _, supply = supplied(FetchMode.CATALOG)
    with pytest.raises(NodeFault) as caught:
        async with supply.provided(Request(model="sd15", safety_checker="blur"), lambda progress: None):
            pass
    assert (caught.value.field, caught.value.part) == ("safety_checker", "safety_checker:blur")
