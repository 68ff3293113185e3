"""Which part failed where an annotation did: the annotator, or the device. Imports no network library."""

import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2

from fanlight.errors import Cancelled, FanlightError, InvalidField, NodeFault, ResourceExhausted
from services.kernel.logs import get_logger
from services.preprocessor.annotation import Annotation
from services.preprocessor.config import AnnotatorDevice
from services.preprocessor.weights import AnnotatorWeights, UnusableWeights
from services.worker.device import DeviceLost

log = get_logger()

# What libraries raise about a file that is damaged or of another network, and about an image that they cannot process.
_CONTENT_ERRORS: tuple[type[BaseException], ...] = (
    ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError, MemoryError, OSError,
    RuntimeError, StopIteration, TypeError, ValueError, cv2.error, pickle.UnpicklingError, zipfile.BadZipFile,
)  # fmt: skip
# They have their exceptions' classes; there only where a network of that kind was loaded.
_ONNX_ERRORS = "onnxruntime.capi.onnxruntime_pybind11_state"
_SAFETENSORS = "safetensors"
_OOM_TEXTS = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "can't allocate memory", "out of memory")
# A device without memory for an image that is worked on at so many pixels on the short side has none for any.
_SMALL_SIDE_PX = 512


class NetworkNotBuilt(Exception):
    """A network could not be built from these files; the cause is the library's own error."""

    def __init__(self, files: tuple[str, ...]) -> None:
        super().__init__(files)
        self.files = files


class AnnotatorFailed(InvalidField):
    """An annotator fails on this image with these parameters, as it would everywhere."""

    reason = "ANNOTATOR_FAILED"


def part_of(annotation: Annotation) -> str:
    return f"annotator:{annotation.annotator.id}"


@contextmanager
def blames_weights(annotation: Annotation, device: AnnotatorDevice) -> Iterator[None]:
    """Errors inside, where the annotator's network is fetched and built, name it, its source or the device."""
    name = annotation.annotator.id
    try:
        yield
    except FanlightError as error:
        error.of_part(part_of(annotation))
        raise
    except ImportError as error:
        _log(annotation, error)
        text = f"{name} cannot run here: one of the packages that it needs cannot be imported; see the worker's log"
        raise NodeFault(text, field="annotator").of_part(part_of(annotation)) from error
    except NetworkNotBuilt as failed:
        cause = failed.__cause__
        assert cause is not None, "names_files sets it"
        _log(annotation, cause)
        if fault := _fault_of_device(cause, annotation, device):
            raise fault from cause
        raise _unusable(annotation, cause, failed.files) from cause


def _unusable(annotation: Annotation, error: BaseException, files: tuple[str, ...]) -> FanlightError:
    """A file that cannot be read is this node's fault; one that is damaged may be damaged everywhere."""
    name, listed = annotation.annotator.id, ", ".join(files)
    if isinstance(error, OSError):
        text = f"the weights of {name} cannot be read here: {listed}; look for the file and its permissions"
        return NodeFault(text, field="annotator").of_part(part_of(annotation))
    return damaged(name, listed).of_part(part_of(annotation))


def damaged(name: str, files: str) -> UnusableWeights:
    text = f"the weights of {name} cannot be used: {files} is damaged or of another network"
    return UnusableWeights(f"{text}; delete it, so that it is fetched again, or replace it", field="annotator")


@contextmanager
def names_files(weights: AnnotatorWeights, folder: Path) -> Iterator[None]:
    """Errors inside, where a network is built from the folder's files, become NetworkNotBuilt with those to blame."""
    try:
        yield
    except (FanlightError, ImportError):
        raise
    except _content_errors() as error:
        raise NetworkNotBuilt(weights.altered_files(folder) or weights.files) from error


@contextmanager
def blames_annotator(
    annotation: Annotation, device: AnnotatorDevice, altered_files: Callable[[], tuple[str, ...]] = tuple
) -> Iterator[None]:
    """Errors inside, where the map is drawn, name the annotator or the device; not those about the request itself.

    `altered_files`: the files of its weights that are not the pinned ones, which are to blame before any image is.
    """
    name = annotation.annotator.id
    try:
        yield
    except (InvalidField, Cancelled):
        raise
    except FanlightError as error:
        error.of_part(part_of(annotation))
        raise
    except _content_errors() as error:
        _log(annotation, error)
        if fault := _fault_of_device(error, annotation, device):
            raise fault from error
        if files := altered_files():
            raise damaged(name, ", ".join(files)).of_part(part_of(annotation)) from error
        text = f"{name} fails on this image with these parameters: try other ones, another image or another annotator"
        raise AnnotatorFailed(text, field="image").of_part(part_of(annotation)) from error


def _content_errors() -> tuple[type[BaseException], ...]:
    """Looked up when an error is there: what a library raises is known only once it is imported."""
    modules = [sys.modules[name] for name in (_ONNX_ERRORS, _SAFETENSORS) if name in sys.modules]
    found = [each for module in modules for each in vars(module).values()]
    own = [each for each in found if isinstance(each, type) and issubclass(each, Exception)]
    return (*_CONTENT_ERRORS, *own)


def _fault_of_device(error: BaseException, annotation: Annotation, device: AnnotatorDevice) -> FanlightError | None:
    """None where the device is not to blame."""
    part = f"device:{device.kind}"
    torch = sys.modules.get("torch")
    if torch and isinstance(error, torch.AcceleratorError):
        return DeviceLost("the worker's device failed; its process starts again").of_part(part)
    is_oom = isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))
    if not is_oom and not any(text in str(error) for text in _OOM_TEXTS):
        return None
    full = ResourceExhausted("the device is out of memory: it cannot annotate an image of this size", field="image")
    side_px = annotation.parameters.get("detect_resolution") or 0
    return full.of_part(part) if 0 < int(side_px) <= _SMALL_SIDE_PX else full


def _log(annotation: Annotation, error: BaseException) -> None:
    """A cause may name paths, so it is only logged."""
    log.warning("annotator_failed", annotator=annotation.annotator.id, cause=repr(error)[:500], exc_info=error)
