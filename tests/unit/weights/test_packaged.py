"""The starter model is in the catalog like any other, and lies where the package does."""

import hashlib

import pytest

from fanlight.errors import InvalidField
from services.diffusion.models.scan import starter_folder
from services.weights.references.catalog import packaged_place, shipped
from services.weights.references.references import PackageRef, parse
from services.weights.settings import WeightsSettings
from services.weights.store.store import WeightStore

NAMES = shipped().expand(["starter-all"])


@pytest.fixture
async def store(tmp_path):
    settings = WeightsSettings(dir=tmp_path, offline=True, hf_endpoint="http://127.0.0.1:9")
    async with WeightStore.open(settings) as store:
        yield store


@pytest.mark.parametrize("name", NAMES)
def test_what_the_catalog_says_of_a_file_is_true_of_the_shipped_one(name):
    entry = shipped().require(name)
    place = packaged_place(entry)
    for file in entry.files:
        body = (place / file.path if place.is_dir() else place).read_bytes()
        assert (len(body), hashlib.sha256(body).hexdigest()) == (file.size_bytes, file.sha256)
    assert entry.license == "MIT AND Apache-2.0"


def test_every_shipped_weight_file_is_in_the_catalog():
    folder = starter_folder()
    listed = {parse(file.sources[0]).path for name in NAMES for file in shipped().require(name).files}
    shipped_weights = {f"starter/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.safetensors")}
    assert shipped_weights <= listed


async def test_nothing_of_the_starter_model_is_fetched_and_it_is_used_where_it_lies(store):
    [plan] = await store.plan(["fanlight/starter"], store.selection("text2img"))
    fetched = await store.fetch("fanlight/starter", store.selection("text2img"))
    assert (plan.fetch_bytes, plan.held_bytes) == (0, plan.manifest.total_bytes)
    assert fetched.path == starter_folder() / "model"
    assert fetched.downloaded_bytes == 0


async def test_a_packaged_model_of_one_file_is_that_file(store):
    async with store.acquire("starter-lora-cyanotype-kohya") as path:
        assert path == starter_folder() / "lora-cyanotype" / "kohya.safetensors"


async def test_a_file_of_the_package_can_be_named_by_itself(store):
    assert await store.ensure("package:starter/NOTICE") == starter_folder() / "NOTICE"


@pytest.mark.parametrize("text", ["package:", "package:../secret", "package:/etc/passwd"])
def test_no_package_reference_leaves_the_package(text):
    with pytest.raises(InvalidField):
        parse(text)


def test_a_package_reference_is_written_as_it_is_read():
    assert str(parse("package:starter/NOTICE")) == str(PackageRef(path="starter/NOTICE")) == "package:starter/NOTICE"
