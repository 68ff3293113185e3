"""Models stay by bytes: what is used least recently goes first, what is in use never."""

import gc
import json
import shutil
from dataclasses import replace

import pytest
import torch

from fanlight.errors import ResourceExhausted
from services.diffusion.models.device import CpuDevice, CudaDevice
from services.diffusion.models.folders import read_vae
from services.diffusion.models.library import Library, Residency
from services.diffusion.models.residency import Lease, Tier
from services.diffusion.models.scan import scan
from tests.fakes.device import FakeGpu
from tests.fakes.models import make_tiny_model


@pytest.fixture
def tier():
    return Tier("RAM", limit_bytes=100)


def put(tier, key, size_bytes):
    lease = Lease()
    tier.put(key, f"the {key}", size_bytes, lease)
    return lease


def test_the_least_recently_used_goes_first(tier):
    for key in "abc":
        put(tier, key, 30)
    tier.get("a", Lease())
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
    second = Lease()
    tier.get("a", second)
    del first
    with pytest.raises(ResourceExhausted):
        put(tier, "b", 60)
    del second
    put(tier, "b", 60)
    assert set(tier.keys) == {"b"}


def test_room_for_the_largest_work_stays_free(tier):
    working = Lease(work_bytes=40)
    tier.admit(working)
    tier.admit(Lease(work_bytes=30))
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
    """A catalogue of two tiny checkpoints, and how many bytes one has in memory."""
    root = tmp_path_factory.mktemp("two")
    for seed, name in enumerate(("first", "second")):
        make_tiny_model(root / name, seed=seed)
    catalogue = scan([root])
    library = Library(device="cpu")
    library.checkpoint(catalogue.checkpoint("first"))
    return catalogue, library.used_bytes


def test_a_checkpoint_makes_room_for_the_next_one_once_nobody_uses_it(two):
    catalogue, size_bytes = two
    first, second = catalogue.checkpoint("first"), catalogue.checkpoint("second")
    library = Library(device="cpu", ram_bytes=int(size_bytes * 1.5))
    used = library.checkpoint(first)
    with pytest.raises(ResourceExhausted):
        library.checkpoint(second)
    assert library.residency(first) is Residency.RAM
    del used
    gc.collect()
    library.checkpoint(second)
    assert library.residency(second) is Residency.RAM
    assert library.used_bytes <= size_bytes * 1.5


def test_on_a_gpu_models_come_by_way_of_ram_and_come_back_without_the_disk(two):
    catalogue, size_bytes = two
    first, second = catalogue.checkpoint("first"), catalogue.checkpoint("second")
    gpu = FakeGpu()
    library = Library(open_device=lambda wanted: gpu, vram_bytes=int(size_bytes * 1.2), ram_bytes=size_bytes * 4)
    library.checkpoint(first)
    assert (library.residency(first), library.residency(second)) == (Residency.VRAM, Residency.DISK)
    library.checkpoint(second)
    assert library.residency(second) is Residency.VRAM
    uploads = gpu.uploads
    library.checkpoint(first)
    # Back from RAM: the unet at least was uploaded anew, and nothing was read.
    assert gpu.uploads > uploads
    assert gpu.frees > 0
    assert library.device_name == "cuda:Fake"


def test_a_picture_that_no_device_of_this_size_could_paint_is_refused_before_anything_is_loaded(two, asked):
    catalogue, size_bytes = two
    library = Library(device="cpu", ram_bytes=size_bytes)
    huge = replace(asked(width_px=8192, height_px=8192), checkpoint=catalogue.checkpoint("first"))
    with pytest.raises(ResourceExhausted, match="a picture of this size"):
        library.assembled(huge)
    assert library.used_bytes == 0


@pytest.mark.parametrize(("is_upcast", "dtype"), [(True, torch.float32), (False, torch.float16)])
def test_a_vae_of_its_own_folder_says_itself_whether_half_precision_is_enough(is_upcast, dtype, two, asked, tmp_path):
    catalogue, _ = two
    checkpoint = catalogue.checkpoint("first")
    folder = shutil.copytree(checkpoint.path / "vae", tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "force_upcast": is_upcast}))
    recipe = replace(checkpoint.recipe, vae={**checkpoint.recipe.vae, "force_upcast": not is_upcast})
    library = Library(open_device=lambda wanted: HalfGpu())
    generation = replace(asked(vae=read_vae(folder)), checkpoint=replace(checkpoint, recipe=recipe))
    assert library.assembled(generation).vae.dtype == dtype


class HalfGpu(FakeGpu):
    dtype = torch.float16


def test_a_file_that_was_replaced_is_loaded_anew(tmp_path):
    folder = make_tiny_model(tmp_path / "first", seed=0)
    entry = scan([folder]).default()
    library = Library(device="cpu")
    before = library.checkpoint(entry)
    make_tiny_model(tmp_path / "other", seed=1)
    weights = "model/unet/diffusion_pytorch_model.safetensors"
    (tmp_path / "other" / weights).rename(folder / weights)
    after = library.checkpoint(entry)
    assert after.unet is not before.unet
    assert after.vae is before.vae


@pytest.mark.parametrize(("wanted", "gpus_found", "precision"), [("cpu", 1, "float32"), ("auto", 0, "float32")])
def test_what_a_device_computes_in_is_known_before_it_is_open(wanted, gpus_found, precision, monkeypatch):
    monkeypatch.setattr("services.kernel.gpus.count", lambda: gpus_found)
    assert Library(device=wanted).precision == precision == str(CpuDevice.dtype).removeprefix("torch.")


@pytest.mark.parametrize("wanted", ["auto", "cuda", "cuda:1"])
def test_where_there_is_a_gpu_it_computes_in_half_precision(wanted, monkeypatch):
    monkeypatch.setattr("services.kernel.gpus.count", lambda: 2)
    assert Library(device=wanted).precision == "float16" == str(CudaDevice.dtype).removeprefix("torch.")


def test_once_a_device_is_open_it_says_itself_what_it_computes_in(two):
    library = Library(device="auto", open_device=lambda wanted: FakeGpu())
    library.checkpoint(two[0].default())
    assert library.precision == "float32"
