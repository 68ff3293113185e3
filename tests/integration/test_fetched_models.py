"""A request names a model that is on a hub: it is fetched, found, loaded and used, by the real store."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import NotFound
from services.diffusion.models.catalog import ModelCatalog
from services.diffusion.models.entries import LoraUse
from services.diffusion.models.model_manager import ModelManager
from services.diffusion.models.scan import scan
from services.diffusion.models.tiers import Residency
from services.diffusion.supply import FetchMode, RemoteModels, Supply
from services.diffusion.wire import models_to_proto
from services.weights.provision import Provision
from services.weights.references.catalog import shipped
from services.weights.settings import WeightsSettings
from tests.fakes.models import make_tiny_model
from tests.fakes.range_server import RangeServer
from tests.fakes.weight_sites import put_repository

TO_K = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("hub") / "tiny")


@pytest.fixture
def hub(tiny, tmp_path):
    """org/tiny is a checkpoint, org/tiny-canny a ControlNet, org/style a LoRA."""
    lora = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({f"{TO_K}.lora_A.weight": torch.ones(1, 16), f"{TO_K}.lora_B.weight": torch.ones(16, 1)}, lora)
    with RangeServer() as server:
        put_repository(server, "org/tiny", _files(tiny / "model"))
        put_repository(server, "org/tiny-canny", _files(tiny / "controlnet-canny"))
        put_repository(server, "org/style", {lora.name: lora.read_bytes()})
        yield server


def _files(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


async def test_checkpoint_controlnet_and_lora_come_from_a_hub_and_are_used(hub, tiny, tmp_path):
    settings = WeightsSettings(dir=tmp_path / "store", hf_endpoint=hub.url, retries=2)
    request = diffusion_pb2.GenerateRequest(
        model="hf:org/tiny",
        controls=[diffusion_pb2.Control(controlnet="hf:org/tiny-canny")],
        loras=[diffusion_pb2.LoraUse(model="hf:org/style")],
    )
    catalog, manager = ModelCatalog(), ModelManager(device="cpu")
    with ThreadPoolExecutor(1) as readers:
        async with Provision(settings) as provision:
            supply = Supply(catalog, provision, RemoteModels(catalog=shipped(), fetch=FetchMode.ANY), readers=readers)
            async with supply.provided(request, lambda progress: None):
                entry = catalog.checkpoint("hf:org/tiny")
                net = catalog.controlnet("hf:org/tiny-canny", entry)
                lora = catalog.lora("hf:org/style", entry)
                loaded = manager.checkpoint(entry, [net])
                assert LoraUse(entry=lora)
            local = manager.checkpoint(scan([tiny]).default())
            states = loaded.unet.state_dict(), local.unet.state_dict()
            assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
            hub.seen.clear()
            async with supply.provided(request, lambda progress: None):
                pass
            assert not [seen for seen in hub.seen if "safetensors" in str(seen) and "GET" in str(seen)]
    listed = {model.id: model for model in models_to_proto(catalog)}
    assert {"hf:org/tiny", "hf:org/style"} <= set(listed)
    assert listed["hf:org/tiny"].residency == diffusion_pb2.Model.RESIDENCY_DISK


async def test_what_was_evicted_in_whole_or_in_part_is_told_as_remote_again(hub, tmp_path):
    settings = WeightsSettings(dir=tmp_path / "store", hf_endpoint=hub.url, retries=2)
    request = diffusion_pb2.GenerateRequest(model="hf:org/tiny", loras=[diffusion_pb2.LoraUse(model="hf:org/style")])
    catalog, manager = ModelCatalog(), ModelManager(device="cpu")
    with ThreadPoolExecutor(1) as readers:
        async with Provision(settings) as provision:
            supply = Supply(catalog, provision, RemoteModels(catalog=shipped(), fetch=FetchMode.ANY), readers=readers)
            async with supply.provided(request, lambda progress: None):
                pass
            entry = catalog.checkpoint("hf:org/tiny")
            lora = catalog.lora("hf:org/style", entry)
            assert {manager.residency(each) for each in (entry, lora)} == {Residency.DISK}
            store = await provision.store()
            [unet] = (entry.path / "unet").glob("*.safetensors")
            store.objects.remove(unet.resolve().name)
            assert (manager.residency(entry), manager.residency(lora)) == (Residency.REMOTE, Residency.DISK)
            store.objects.evict(1 << 60)
            assert {manager.residency(each) for each in (entry, lora)} == {Residency.REMOTE}
            async with supply.provided(request, lambda progress: None):
                assert manager.residency(catalog.checkpoint("hf:org/tiny")) is Residency.DISK


async def test_what_no_hub_has_is_an_error_that_names_it(hub, tmp_path):
    settings = WeightsSettings(dir=tmp_path / "store", hf_endpoint=hub.url, retries=1)
    with ThreadPoolExecutor(1) as readers:
        async with Provision(settings) as provision:
            supply = Supply(
                ModelCatalog(), provision, RemoteModels(catalog=shipped(), fetch=FetchMode.ANY), readers=readers
            )
            with pytest.raises(NotFound, match="org/nothing") as caught:
                async with supply.provided(diffusion_pb2.GenerateRequest(model="hf:org/nothing"), print):
                    pass
    assert caught.value.field == "model"
