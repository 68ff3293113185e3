"""A failed annotation names the annotator, the source of its weights or the device, and only the one to blame."""

import contextlib
import pickle
from pathlib import Path

import cv2
import pytest
import torch

from fanlight.errors import FanlightError, InvalidField, NodeFault, ResourceExhausted
from services.kernel.images import ImageLimits
from services.preprocessor.annotation import Annotation
from services.preprocessor.annotator import Annotator
from services.preprocessor.engine import AnnotationEngine
from services.preprocessor.faults import AnnotatorFailed, UnusableWeights
from services.preprocessor.neural.runtime import read_weights
from services.preprocessor.weights import AnnotatorWeights, StoreWeights, ignore_progress
from services.weights.errors import DiskFull, Unreachable
from services.weights.settings import WeightsSettings
from services.worker.device import DeviceLost
from tests.fakes.synthetic_images import encoded, scene

HED = "annotator-hed"


class OneFolder:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextlib.asynccontextmanager
    async def folder(self, weights, report=ignore_progress):
        yield self._folder


async def failure_of(annotator: Annotator, weights=None, *, image: bytes = b"", **parameters) -> FanlightError:
    lost = []
    engine = AnnotationEngine(threads=1, limits=ImageLimits(), weights=weights, on_lost=lost.append)
    annotation = Annotation(annotator=annotator, parameters=parameters, image=image or encoded(scene(8, 8)))
    try:
        with pytest.raises(FanlightError) as raised:
            await engine.run(annotation)
    finally:
        engine.close()
    assert bool(lost) == isinstance(raised.value, DeviceLost)
    return raised.value


def drawing(error: Exception) -> Annotator:
    def fail(image, **parameters):
        raise error

    return Annotator(id="sketch", description="", apply=fail)


def building(build) -> Annotator:
    model = AnnotatorWeights(name="hed", entry=HED, build=build)
    return Annotator(id="sketch", description="", apply=lambda images, model: images, models=(model,))


@pytest.mark.parametrize(
    "error",
    [ValueError("cause"), RuntimeError("cause"), IndexError("cause"), cv2.error("cause"), ZeroDivisionError("cause")],
    ids=repr,
)
async def test_an_annotator_that_fails_on_an_image_ends_that_task_and_is_named(error):
    failed = await failure_of(drawing(error))
    assert isinstance(failed, AnnotatorFailed)
    assert (failed.part, failed.field, failed.is_request_fault) == ("annotator:sketch", "image", True)
    assert "cause" not in failed.message


async def test_an_image_that_cannot_be_read_is_nobody_elses_fault():
    failed = await failure_of(drawing(ValueError()), image=b"no image")
    assert isinstance(failed, InvalidField)
    assert (failed.part, failed.field) == ("", "image")


@pytest.mark.parametrize(
    "content",
    [b"", b"no tensors at all " * 50, b"PK\x03\x04" + b"\0" * 50, pickle.dumps({"a": 1}), pickle.dumps([print])],
)
async def test_damaged_weights_name_the_annotator_and_are_no_internal_error(content, tmp_path):
    (tmp_path / "ControlNetHED.pth").write_bytes(content)
    network = torch.nn.Linear(1, 1)

    def build(folder, device):
        network.load_state_dict(read_weights(folder / "ControlNetHED.pth"))

    failed = await failure_of(building(build), OneFolder(tmp_path))
    assert isinstance(failed, UnusableWeights)
    assert failed.part == "annotator:sketch"
    assert str(tmp_path) not in failed.message


async def test_a_missing_package_or_file_is_the_nodes_fault_at_that_annotator(tmp_path):
    def unimportable(folder, device):
        raise ImportError("no such package")

    def unreadable(folder, device):
        (folder / "nothing").read_bytes()

    for build in (unimportable, unreadable):
        failed = await failure_of(building(build), OneFolder(tmp_path))
        assert (type(failed), failed.part) == (NodeFault, "annotator:sketch")


async def test_weights_that_cannot_be_fetched_name_their_source(tmp_path, monkeypatch):
    @contextlib.asynccontextmanager
    async def acquire(self, reference, pipeline="", *, report):
        raise failure
        yield

    monkeypatch.setattr("services.weights.store.store.WeightStore.acquire", acquire)
    for failure, part in (
        (Unreachable("cannot be reached").of_part("source:hub.example"), "source:hub.example"),
        (DiskFull("no room"), "annotator:sketch"),
    ):
        async with StoreWeights(WeightsSettings(dir=tmp_path)) as weights:
            failed = await failure_of(building(lambda folder, device: None), weights)
        assert (type(failed), failed.part) == (type(failure), part)


async def test_a_build_that_runs_out_of_weights_ends(tmp_path):
    """asyncio's futures take no StopIteration: who waits for one would wait for ever."""
    failed = await failure_of(building(lambda folder, device: next(iter(()))), OneFolder(tmp_path))
    assert (type(failed), failed.part) == (UnusableWeights, "annotator:sketch")


async def test_a_gpu_that_fails_or_is_full_is_named_where_no_other_size_explains_it(tmp_path):
    def full(images, model, **parameters):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken(images, model, **parameters):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def annotator(apply) -> Annotator:
        model = AnnotatorWeights(name="hed", entry=HED, build=lambda folder, device: None)
        return Annotator(id="sketch", description="", apply=apply, models=(model,), detect_resolution=512)

    for side_px, part in ((512, "device:cpu"), (2048, "")):
        failed = await failure_of(annotator(full), OneFolder(tmp_path), detect_resolution=side_px)
        assert isinstance(failed, ResourceExhausted)
        assert (failed.part, failed.is_request_fault) == (part, False)
    failed = await failure_of(annotator(broken), OneFolder(tmp_path))
    assert (type(failed), failed.part) == (DeviceLost, "device:cpu")
