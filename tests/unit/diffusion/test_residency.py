"""Models stay by bytes: what is used least recently goes first, what is in use never."""

import gc
import json
import shutil
from dataclasses import replace

import pytest
import torch

from fanlight.errors import ResourceExhausted
from services.diffusion.engine.backend import assemble
from services.diffusion.models.device import CpuDevice, CudaDevice
from services.diffusion.models.model_manager import ModelManager
from services.diffusion.models.scan import read_vae, scan
from services.diffusion.models.tiers import Pin, Residency, Tier
from tests.fakes.device import FakeGpu
from tests.fakes.models import make_tiny_model


@pytest.fixture
def tier():
    return Tier("RAM", limit_bytes=100)


def put(tier, key, size_bytes):
    lease = Pin()
    tier.put(key, f"the {key}", size_bytes, lease)
    return lease


def test_the_least_recently_used_goes_first(tier):
    for key in "abc":
        put(tier, key, 30)
    tier.get("a", Pin())
    put(tier, "d", 30)
    assert set(tier.keys) == {"c", "a", "d"}
    assert tier.used_bytes == 90


def test_what_is_in_use_stays_however_old_it_is(tier):
    old = put(tier, "a", 40)
    put(tier, "b", 40)
    put(tier, "c", 40)
    assert set(tier.keys) == {"a", "c"}
    del old
    put(tier, "d", 70)
    assert set(tier.keys) == {"d"}


def test_what_does_not_fit_beside_what_is_in_use_is_refused_and_drops_nothing(tier):
    kept = put(tier, "a", 60)
    put(tier, "b", 30)
    with pytest.raises(ResourceExhausted, match="60 are in use"):
        put(tier, "c", 50)
    assert set(tier.keys) == {"a", "b"}
    assert kept


def test_two_users_of_one_thing_must_both_be_done(tier):
    first = put(tier, "a", 60)
    second = Pin()
    tier.get("a", second)
    del first
    with pytest.raises(ResourceExhausted):
        put(tier, "b", 60)
    del second
    put(tier, "b", 60)
    assert set(tier.keys) == {"b"}


def test_room_for_the_largest_work_stays_free(tier):
    working = Pin(work_bytes=40)
    tier.admit(working)
    tier.admit(Pin(work_bytes=30))
    old = put(tier, "a", 60)
    with pytest.raises(ResourceExhausted):
        put(tier, "b", 10)
    del working
    put(tier, "b", 40)
    assert set(tier.keys) == {"a", "b"}
    assert old


def test_the_evicted_are_told():
    gone = []
    tier = Tier("VRAM", limit_bytes=50, on_evicted=gone.append)
    for key in "abc":
        put(tier, key, 25)
    assert gone == ["a"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A catalog of two tiny checkpoints, and how many bytes one has in memory."""
    root = tmp_path_factory.mktemp("two")
    for seed, name in enumerate(("first", "second")):
        make_tiny_model(root / name, seed=seed)
    catalog = scan([root])
    manager = ModelManager(device="cpu")
    manager.checkpoint(catalog.checkpoint("first"))
    return catalog, manager.used_bytes


def test_a_checkpoint_makes_room_for_the_next_one_once_nobody_uses_it(two):
    catalog, size_bytes = two
    first, second = catalog.checkpoint("first"), catalog.checkpoint("second")
    manager = ModelManager(device="cpu", ram_bytes=int(size_bytes * 1.5))
    used = manager.checkpoint(first)
    with pytest.raises(ResourceExhausted):
        manager.checkpoint(second)
    assert manager.residency(first) is Residency.RAM
    del used
    gc.collect()
    manager.checkpoint(second)
    assert manager.residency(second) is Residency.RAM
    assert manager.used_bytes <= size_bytes * 1.5


def test_on_a_gpu_models_come_by_way_of_ram_and_come_back_without_the_disk(two):
    catalog, size_bytes = two
    first, second = catalog.checkpoint("first"), catalog.checkpoint("second")
    gpu = FakeGpu()
    manager = ModelManager(open_device=lambda wanted: gpu, vram_bytes=int(size_bytes * 1.2), ram_bytes=size_bytes * 4)
    manager.checkpoint(first)
    assert (manager.residency(first), manager.residency(second)) == (Residency.VRAM, Residency.DISK)
    manager.checkpoint(second)
    assert manager.residency(second) is Residency.VRAM
    uploads = gpu.uploads
    manager.checkpoint(first)
    # Back from RAM: the unet at least was uploaded again, and nothing was read.
    assert gpu.uploads > uploads
    assert gpu.frees > 0
    assert manager.device_name == "cuda:Fake"


def test_an_image_that_no_device_of_this_size_could_generate_is_refused_before_anything_is_loaded(two, asked):
    catalog, size_bytes = two
    manager = ModelManager(device="cpu", ram_bytes=size_bytes)
    huge = replace(asked(width_px=8192, height_px=8192), checkpoint=catalog.checkpoint("first"))
    with pytest.raises(ResourceExhausted, match="an image of this size"):
        assemble(manager, huge)
    assert manager.used_bytes == 0


@pytest.mark.parametrize(("is_upcast", "dtype"), [(True, torch.float32), (False, torch.float16)])
def test_a_vae_of_its_own_folder_says_itself_whether_half_precision_is_enough(is_upcast, dtype, two, asked, tmp_path):
    catalog, _ = two
    checkpoint = catalog.checkpoint("first")
    folder = shutil.copytree(checkpoint.path / "vae", tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "force_upcast": is_upcast}))
    recipe = replace(checkpoint.recipe, vae={**checkpoint.recipe.vae, "force_upcast": not is_upcast})
    manager = ModelManager(open_device=lambda wanted: HalfGpu())
    generation = replace(asked(vae=read_vae(folder)), checkpoint=replace(checkpoint, recipe=recipe))
    assert assemble(manager, generation).vae.dtype == dtype


class HalfGpu(FakeGpu):
    dtype = torch.float16


def test_a_file_that_was_replaced_is_loaded_again(tmp_path):
    folder = make_tiny_model(tmp_path / "first", seed=0)
    entry = scan([folder]).default()
    manager = ModelManager(device="cpu")
    before = manager.checkpoint(entry)
    make_tiny_model(tmp_path / "other", seed=1)
    weights = "model/unet/diffusion_pytorch_model.safetensors"
    (tmp_path / "other" / weights).rename(folder / weights)
    after = manager.checkpoint(entry)
    assert after.unet is not before.unet
    assert after.vae is before.vae


@pytest.mark.parametrize(("wanted", "gpus_found", "precision"), [("cpu", 1, "float32"), ("auto", 0, "float32")])
def test_what_a_device_computes_in_is_known_before_it_is_open(wanted, gpus_found, precision, monkeypatch):
    monkeypatch.setattr("services.kernel.process.count_gpus", lambda: gpus_found)
    assert ModelManager(device=wanted).precision == precision == str(CpuDevice.dtype).removeprefix("torch.")


@pytest.mark.parametrize("wanted", ["auto", "cuda", "cuda:1"])
def test_a_gpu_that_says_nothing_computes_in_half_precision(wanted, monkeypatch):
    monkeypatch.setattr("services.kernel.process.count_gpus", lambda: 2)
    assert ModelManager(device=wanted).precision == "float16" == str(CudaDevice.dtype).removeprefix("torch.")


def test_once_a_device_is_open_it_says_itself_what_it_computes_in(two):
    manager = ModelManager(device="auto", open_device=lambda wanted: FakeGpu())
    manager.checkpoint(two[0].default())
    assert manager.precision == "float32"
