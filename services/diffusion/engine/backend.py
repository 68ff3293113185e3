"""The engine's work on the device, with torch. For the device thread."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch

from fanlight.errors import FanlightError, ResourceExhausted
from services.diffusion.engine.conditioning import ConditioningCache
from services.diffusion.engine.controls import ControlEmbeddingCache, control_rows
from services.diffusion.engine.diagnosis import culprit
from services.diffusion.engine.generation import Generation, Safety
from services.diffusion.engine.memory import OomRetry, vram_estimate_bytes, with_culprit
from services.diffusion.engine.ports import DeviceResult, RequestState, StepProgress, StepResult
from services.diffusion.engine.previews import due_preview
from services.diffusion.engine.row import Row, nan_error
from services.diffusion.engine.row_steps import StepOutcome, take_steps
from services.diffusion.engine.safety import SafetyChecker
from services.diffusion.engine.unet_step import predict
from services.diffusion.engine.vae import ModelGaveNaN, decode_image
from services.diffusion.images import Pixels
from services.diffusion.models.entries import CheckpointEntry, ControlNetEntry
from services.diffusion.models.faults import blames, part_of, part_of_device
from services.diffusion.models.loading import leftovers_of
from services.diffusion.models.model_cache import Checkpoint
from services.diffusion.models.model_manager import ModelManager
from services.kernel.logs import get_logger
from services.worker.device import DeviceLost

log = get_logger()

_FLOAT32_BYTES = 4
# Below so many weights times latent pixels an evaluation is too short for several threads: measured on two cores, a
# second thread saves nothing for 5 million weights on 16 x 16 latents, and costs a multiple beside other work.
_MANY_THREADS_ABOVE = 2e10


class TorchBackend:
    def __init__(self, models: ModelManager, *, threads: int, safety: SafetyChecker | None = None) -> None:
        """`threads`: 0 chooses by the work, see `ThreadCount`."""
        self._safety = safety or SafetyChecker(lambda: None)
        self._models = models
        self._threads = ThreadCount(threads)
        self._conditioning = ConditioningCache()
        self._controls = ControlEmbeddingCache()
        self._oom = OomRetry(self._release)

    def load(self, checkpoint: CheckpointEntry, controlnets: Sequence[ControlNetEntry]) -> None:
        work = partial(self._models.checkpoint, checkpoint, controlnets)
        with self._device_faults(), blames(checkpoint):
            self._oom.retry_after_release(work, "load these models", field="model")

    @torch.inference_mode()
    def begin(self, generation: Generation) -> Row:
        with self._device_faults(generation):
            return self._oom.retry_after_release(lambda: self._begin(generation), "begin this image")

    @contextmanager
    def _device_faults(self, generation: Generation | None = None) -> Iterator[None]:
        """DeviceLost names the device; ResourceExhausted too, unless the size of the generation explains it."""
        try:
            yield
        except torch.AcceleratorError as error:
            lost = DeviceLost("the worker's device failed; its process starts again")
            raise lost.of_part(part_of_device(self._models.device_name)) from error
        except ResourceExhausted as error:
            if generation is None:
                raise
            raise with_culprit(error, generation, self._models.device_name) from error

    @torch.inference_mode()
    def begin_again(self, state: RequestState) -> Row:
        """In float32. The error of the number type that was tried first, where there is no memory for that."""
        row = cast(Row, state)
        generation = row.generation
        log.warning("nan_tried_in_float32", part="unet", model=generation.model, dtype=_name(row.checkpoint.dtype))
        try:
            with self._device_faults(generation):
                said = (f"the model gave NaN in {_name(row.checkpoint.dtype)}; the image was made again in float32",)
                return self._oom.retry_after_release(lambda: self._begin(generation, again=said), "begin again")
        except ResourceExhausted as error:
            raise _nan_error(row) from error

    def _begin(self, generation: Generation, *, again: tuple[str, ...] = ()) -> Row:
        """`again`: why it is begun again, in float32."""
        checkpoint = assemble(self._models, generation, in_float32=bool(again))
        self._threads.set_for(generation, checkpoint)
        with deterministic(generation.strict):
            with blames(generation.checkpoint):
                conditioning = self._conditioning.get(generation, checkpoint)
            controls = control_rows(generation, checkpoint, list(checkpoint.nets), self._controls)
            return Row(generation, checkpoint, conditioning, controls, warnings=again)

    @torch.inference_mode()
    def advance(self, states: Sequence[RequestState]) -> list[StepResult]:
        with self._device_faults():
            return self._advance(cast(Sequence[Row], states))

    def _advance(self, rows: Sequence[Row]) -> list[StepResult]:
        self._threads.set_for(rows[0].generation, rows[0].checkpoint)
        with deterministic(rows[0].generation.strict):
            outcomes = take_steps(rows, predict(rows, self._oom), self._oom)
            return [self._result(row, outcome) for row, outcome in zip(rows, outcomes, strict=True)]

    def _result(self, row: Row, outcome: StepOutcome) -> StepResult:
        """What left the range of a short number type is begun again in float32, unless the request names a type."""
        if outcome.error is not None or outcome.is_finite:
            return _advanced(row, self._named(row, outcome.error))
        if row.checkpoint.dtype == torch.float32 or row.generation.precision:
            return _advanced(row, _nan_error(row))
        return StepResult(progress=StepProgress(step=0, steps=row.evaluations), is_finished=False, is_again=True)

    def _named(self, row: Row, error: FanlightError | None) -> FanlightError | None:
        if isinstance(error, ResourceExhausted):
            return with_culprit(error, row.generation, self._models.device_name)
        return error

    @torch.inference_mode()
    def finish(self, state: RequestState) -> DeviceResult:
        row = cast(Row, state)
        with self._device_faults(row.generation):
            return self._oom.retry_after_release(lambda: self._finish(row), "finish an image of this size")

    def _finish(self, row: Row) -> DeviceResult:
        checkpoint = row.checkpoint
        with deterministic(row.generation.strict), blames(row.generation.vae_entry):
            pixels, checkpoint, said = self._decode(row)
        parts = (checkpoint.unet, checkpoint.vae, *(text.encoder for text in checkpoint.texts), *checkpoint.nets)
        nsfw = None
        if row.generation.safety_checker is not Safety.OFF:
            pixels, nsfw = self._safety.check(pixels, row.generation.safety_checker, self._models)
        return DeviceResult(
            pixels=pixels,
            nsfw=nsfw,
            device=self._models.device_name,
            dtype=_name(checkpoint.dtype),
            warnings=(*row.warnings, *said, *checkpoint.warnings, *leftovers_of(parts)),
            vae_dtype=_name(checkpoint.vae.dtype),
        )

    def _decode(self, row: Row) -> tuple[Pixels, Checkpoint, tuple[str, ...]]:
        """The pixels, the checkpoint that made them, and a warning where a VAE in float32 had to."""
        checkpoint = row.checkpoint
        try:
            return decode_image(checkpoint, row.latents), checkpoint, ()
        except ModelGaveNaN:
            if checkpoint.vae.dtype == torch.float32:
                raise
            log.warning("nan_tried_in_float32", part="vae", model=row.generation.model)
            again = self._models.with_vae_in_float32(checkpoint, row.generation.vae)
            said = f"the VAE gave NaN in {_name(checkpoint.vae.dtype)}; it decoded again in float32"
            return decode_image(again, row.latents), again, (said,)

    def _release(self) -> None:
        """Drop from the device all that no running image uses."""
        self._conditioning.clear()
        self._controls.clear()
        self._models.release()


def assemble(models: ModelManager, generation: Generation, *, in_float32: bool = False) -> Checkpoint:
    """The generation's checkpoint with its LoRAs, VAE, embeddings and ControlNets, pinned while it is referenced.

    FailedPrecondition where one does not fit; ResourceExhausted where there is no memory for the image.
    """
    return models.checkpoint(
        generation.checkpoint,
        [control.controlnet for control in generation.controls],
        loras=generation.loras,
        vae=generation.vae,
        embeddings=generation.embeddings,
        has_previews=bool(generation.preview_every_steps),
        work_bytes=vram_estimate_bytes(generation, _FLOAT32_BYTES if in_float32 else models.number_bytes),
        in_float32=in_float32,
    )


def _name(dtype: torch.dtype) -> str:
    """Such as `float16`."""
    return str(dtype).removeprefix("torch.")


def _nan_error(row: Row) -> FanlightError:
    return nan_error(row).of_part(part_of(culprit(row)))


def _advanced(row: Row, error: FanlightError | None) -> StepResult:
    preview = due_preview(row) if error is None else None
    progress = StepProgress(step=row.index, steps=row.evaluations, preview=preview)
    return StepResult(progress=progress, is_finished=row.is_finished, error=error)


class ThreadCount:
    """How many threads torch computes with on a CPU. For the device thread, which sets its own number."""

    def __init__(self, count: int) -> None:
        """`count` 0: one thread for small work, for the rest torch's default, which is one a core."""
        self._count = count
        self._most = torch.get_num_threads()

    def set_for(self, generation: Generation, checkpoint: Checkpoint) -> None:
        count = self._count or (self._most if _work(generation, checkpoint) >= _MANY_THREADS_ABOVE else 1)
        if torch.get_num_threads() != count:
            torch.set_num_threads(count)


def _work(generation: Generation, checkpoint: Checkpoint) -> float:
    """Weights times latent pixels."""
    pixels = generation.width_px * generation.height_px / checkpoint.entry.shape.latent_factor**2
    weights: int = checkpoint.weights
    return pixels * weights


@contextmanager
def deterministic(is_strict: bool) -> Iterator[None]:
    """Inside, torch avoids kernels that sum in a different order every time, where it has others."""
    if not is_strict:
        yield
        return
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    # As use_deterministic_algorithms, which would also import torch's compiler and take seconds.
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode("default")
        cudnn.deterministic, cudnn.benchmark = before
