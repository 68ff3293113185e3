"""Networks in memory: loaded once, evicted by bytes, never while in use; and where weights come from."""

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fanlight.errors import FanlightError, InvalidField, NodeFault
from services.preprocessor.cache import AnnotatorCache, AnnotatorCacheLimits
from services.preprocessor.config import AnnotatorDevice, find_device
from services.preprocessor.registry import NEURAL
from services.preprocessor.weights import AnnotatorWeights, FolderWeights, StoreWeights, ignore_progress
from services.weights.errors import TokenRefused
from services.weights.provision import Provision
from services.weights.settings import WeightsSettings
from services.weights.transfer.download import DownloadProgress

# A network of 29 MB, one of 6 MB and one of 17 MB twice.
HED, MLSD, LINEART = "annotator-hed", "annotator-mlsd", "annotator-lineart"


class Somewhere:
    """Weights that are always available."""

    @contextlib.asynccontextmanager
    async def folder(self, weights, report=ignore_progress):
        report(
            DownloadProgress(reference=weights.name, path="", done_bytes=1, total_bytes=1, bytes_per_s=1.0, source="")
        )
        yield Path(weights.name)


class Builder:
    def __init__(self) -> None:
        self.built: list[str] = []

    def __call__(self, folder: Path, device: AnnotatorDevice) -> str:
        self.built.append(str(folder))
        return f"{folder} on {device.kind}"

    def model(self, entry: str) -> AnnotatorWeights:
        return AnnotatorWeights(name=entry.removeprefix("annotator-"), entry=entry, build=self)


@pytest.fixture
def builder():
    return Builder()


@pytest.fixture
def cache_of():
    """A cache with room for this many bytes."""
    with ThreadPoolExecutor(1) as executor:
        yield lambda size_bytes: AnnotatorCache(
            Somewhere(), AnnotatorDevice(), executor, limits=AnnotatorCacheLimits(size_bytes=size_bytes, batch=1)
        )


async def touch(cache: AnnotatorCache, model: AnnotatorWeights) -> None:
    async with cache.use(model):
        pass


async def test_a_network_is_loaded_once_for_concurrent_uses(builder, cache_of):
    cache, model = cache_of(10**9), builder.model(HED)
    await asyncio.gather(*(touch(cache, model) for _ in range(5)))
    assert builder.built == ["hed"]
    assert model in cache


async def test_the_least_recently_used_is_evicted(builder, cache_of):
    cache = cache_of(65_000_000)
    hed, mlsd, lineart = (builder.model(entry) for entry in (HED, MLSD, LINEART))
    for model in (hed, mlsd, hed, lineart):
        await touch(cache, model)
    assert [model in cache for model in (hed, mlsd, lineart)] == [True, False, True]
    assert cache.size_bytes <= 65_000_000


async def test_a_network_in_use_is_pinned_and_evicted_afterwards(builder, cache_of):
    cache, hed, mlsd = cache_of(1), builder.model(HED), builder.model(MLSD)
    async with cache.use(hed):
        await touch(cache, mlsd)
        assert hed in cache
        assert mlsd not in cache
    assert cache.size_bytes == 0


async def test_progress_is_reported_while_weights_are_fetched(builder, cache_of):
    cache, heard = cache_of(10**9), []
    for _ in range(2):
        async with cache.use(builder.model(HED), heard.append):
            pass
    assert [progress.reference for progress in heard] == ["hed"]


@pytest.mark.parametrize(("kind", "expected"), [("cpu", 1), ("cuda", 4)])
async def test_only_a_gpu_gets_batches_of_several_images(builder, kind, expected):
    # On a CPU matrix products round differently for other sizes of a batch.
    with ThreadPoolExecutor(1) as executor:
        cache = AnnotatorCache(Somewhere(), AnnotatorDevice(kind=kind), executor, limits=AnnotatorCacheLimits(batch=4))
        async with cache.use(builder.model(HED)) as loaded:
            assert loaded.batch_limit == expected


async def test_a_network_that_could_not_be_built_is_built_again(builder, cache_of):
    cache = cache_of(10**9)

    def broken(folder: Path, device: AnnotatorDevice) -> object:
        raise NodeFault("broken")

    with pytest.raises(NodeFault):
        await touch(cache, AnnotatorWeights(name="hed", entry=HED, build=broken))
    await touch(cache, builder.model(HED))
    assert builder.built == ["hed"]


async def test_files_in_the_folder_are_used_before_the_fallback(tmp_path, builder):
    model = builder.model(HED)
    weights = FolderWeights(tmp_path, Somewhere())
    async with weights.folder(model) as folder:
        assert folder == Path("hed")
    (tmp_path / "lllyasviel" / "Annotators").mkdir(parents=True)
    (tmp_path / "lllyasviel" / "Annotators" / "ControlNetHED.pth").write_bytes(b"")
    async with weights.folder(model) as folder:
        assert folder == tmp_path / "lllyasviel" / "Annotators"


async def test_unavailable_weights_are_named_with_their_source(tmp_path, builder):
    settings = WeightsSettings(dir=tmp_path, offline=True)
    async with StoreWeights(settings) as weights:
        with pytest.raises(NodeFault) as raised:
            async with weights.folder(builder.model(LINEART)):
                pass
    assert "sk_model.pth from hf:lllyasviel/Annotators" in raised.value.message
    assert "sk_model2.pth" in raised.value.message
    assert raised.value.field == "annotator"


@pytest.mark.parametrize("error", [InvalidField("is malformed", field="manifest"), TokenRefused("wants a token")])
async def test_a_problem_with_weights_is_never_the_requests_fault(tmp_path, builder, monkeypatch, error):
    @contextlib.asynccontextmanager
    async def obtain(self, reference, pipeline="", *, report):
        raise error
        yield

    monkeypatch.setattr(Provision, "obtain", obtain)
    async with StoreWeights(WeightsSettings(dir=tmp_path)) as weights:
        with pytest.raises(FanlightError, match=error.message) as raised:
            async with weights.folder(builder.model(LINEART)):
                pass
    assert (raised.value.is_request_fault, raised.value.field) == (False, "annotator")


@pytest.mark.parametrize("annotator", NEURAL, ids=lambda annotator: annotator.id)
def test_every_network_names_its_files_and_their_sources(annotator):
    for model in annotator.models:
        assert model.size_bytes > 0
        assert all(f"{file} from " in model.describe_files() for file in model.files)


def test_a_named_device_is_used_and_auto_needs_no_torch():
    assert find_device("cpu", threads=3) == AnnotatorDevice(kind="cpu", threads=3)
    assert find_device("cuda", threads=1).label == "cuda/float16"
    assert find_device("auto", threads=1).label in ("cpu/float32", "cuda/float16")
