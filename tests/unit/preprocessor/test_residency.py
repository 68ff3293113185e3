"""Models in memory: loaded once, dropped by bytes, never while in use; and where weights come from."""

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fanlight.errors import FanlightError, InvalidField, NodeFault
from services.preprocessor.device import Device, find_device
from services.preprocessor.registry import NEURAL
from services.preprocessor.residency import Residency, ResidencyLimits
from services.preprocessor.weights import FolderWeights, Model, StoreWeights, tell_nobody, told
from services.weights.errors import TokenRefused
from services.weights.provision import Provision
from services.weights.settings import WeightsSettings
from services.weights.targets import Progress

# A network of 29 MB, one of 6 MB and one of 17 MB twice.
HED, MLSD, LINEART = "annotator-hed", "annotator-mlsd", "annotator-lineart"


class Somewhere:
    """Weights that are always there."""

    @contextlib.asynccontextmanager
    async def folder(self, model, tell=tell_nobody):
        tell(Progress(reference=model.name, path="", done_bytes=1, total_bytes=1, bytes_per_s=1.0, source=""))
        yield Path(model.name)


class Builder:
    def __init__(self) -> None:
        self.built: list[str] = []

    def __call__(self, folder: Path, device: Device) -> str:
        self.built.append(str(folder))
        return f"{folder} on {device.kind}"

    def model(self, entry: str) -> Model:
        return Model(name=entry.removeprefix("annotator-"), entry=entry, build=self)


@pytest.fixture
def builder():
    return Builder()


@pytest.fixture
def residency_of():
    """A residency with room for this many bytes."""
    with ThreadPoolExecutor(1) as executor:
        yield lambda size_bytes: Residency(
            Somewhere(), Device(), executor, limits=ResidencyLimits(bytes=size_bytes, batch=1)
        )


async def touch(residency: Residency, model: Model) -> None:
    async with residency.use(model):
        pass


async def test_a_model_is_loaded_once_for_all_who_want_it_at_the_same_time(builder, residency_of):
    residency, model = residency_of(10**9), builder.model(HED)
    await asyncio.gather(*(touch(residency, model) for _ in range(5)))
    assert builder.built == ["hed"]
    assert residency.holds(model)


async def test_the_one_not_used_for_longest_makes_room(builder, residency_of):
    residency = residency_of(65_000_000)
    hed, mlsd, lineart = (builder.model(entry) for entry in (HED, MLSD, LINEART))
    for model in (hed, mlsd, hed, lineart):
        await touch(residency, model)
    assert [residency.holds(model) for model in (hed, mlsd, lineart)] == [True, False, True]
    assert residency.size_bytes <= 65_000_000


async def test_what_is_in_use_is_never_dropped_and_goes_afterwards(builder, residency_of):
    residency, hed, mlsd = residency_of(1), builder.model(HED), builder.model(MLSD)
    async with residency.use(hed):
        await touch(residency, mlsd)
        assert residency.holds(hed)
        assert not residency.holds(mlsd)
    assert residency.size_bytes == 0


async def test_whoever_waits_for_weights_is_told_how_they_come(builder, residency_of):
    residency, heard = residency_of(10**9), []
    for _ in range(2):
        async with residency.use(builder.model(HED), heard.append):
            pass
    assert [progress.reference for progress in heard] == ["hed"]


@pytest.mark.parametrize(("kind", "expected"), [("cpu", 1), ("cuda", 4)])
async def test_only_a_gpu_takes_several_pictures_at_a_time(builder, kind, expected):
    # On a CPU matrix products round differently for other sizes of a batch.
    with ThreadPoolExecutor(1) as executor:
        residency = Residency(Somewhere(), Device(kind=kind), executor, limits=ResidencyLimits(batch=4))
        async with residency.use(builder.model(HED)) as loaded:
            assert loaded.batch_limit == expected


async def test_a_model_that_could_not_be_built_is_tried_again(builder, residency_of):
    residency = residency_of(10**9)

    def broken(folder: Path, device: Device) -> object:
        raise NodeFault("broken")

    with pytest.raises(NodeFault):
        await touch(residency, Model(name="hed", entry=HED, build=broken))
    await touch(residency, builder.model(HED))
    assert builder.built == ["hed"]


async def test_files_that_lie_in_the_folder_are_taken_from_there(tmp_path, builder):
    model = builder.model(HED)
    weights = FolderWeights(tmp_path, Somewhere())
    async with weights.folder(model) as folder:
        assert folder == Path("hed")
    (tmp_path / "lllyasviel" / "Annotators").mkdir(parents=True)
    (tmp_path / "lllyasviel" / "Annotators" / "ControlNetHED.pth").write_bytes(b"")
    async with weights.folder(model) as folder:
        assert folder == tmp_path / "lllyasviel" / "Annotators"


async def test_weights_that_are_not_to_be_had_are_named_with_their_place(tmp_path, builder):
    settings = WeightsSettings(dir=tmp_path, offline=True)
    async with StoreWeights(settings) as weights:
        with pytest.raises(NodeFault) as raised:
            async with weights.folder(builder.model(LINEART)):
                pass
    assert "sk_model.pth from hf:lllyasviel/Annotators" in raised.value.message
    assert "sk_model2.pth" in raised.value.message
    assert raised.value.field == "annotator"


@pytest.mark.parametrize("error", [InvalidField("is malformed", field="manifest"), TokenRefused("wants a token")])
async def test_what_is_wrong_with_weights_is_never_the_requests_fault(tmp_path, builder, monkeypatch, error):
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
def test_every_model_says_what_it_needs_and_from_where(annotator):
    for model in annotator.models:
        assert model.size_bytes > 0
        assert all(f"{file} from " in told(model) for file in model.files)


def test_a_device_that_is_named_is_taken_and_auto_needs_no_torch():
    assert find_device("cpu", threads=3) == Device(kind="cpu", threads=3)
    assert find_device("cuda", threads=1).label == "cuda/float16"
    assert find_device("auto", threads=1).label in ("cpu/float32", "cuda/float16")
