"""Which pipeline a request is for: it says so, or it is told from what else is set."""

from fanlight.diffusion.v1 import diffusion_pb2
from services.diffusion.generation import Pipeline
from services.diffusion.models.entries import CheckpointEntry
from services.kernel.errors import InvalidField, NotFound

STARTS_FROM_IMAGE = frozenset(
    {Pipeline.IMG2IMG, Pipeline.INPAINT, Pipeline.CONTROLNET_IMG2IMG, Pipeline.CONTROLNET_INPAINT}
)
HAS_MASK = frozenset({Pipeline.INPAINT, Pipeline.CONTROLNET_INPAINT})
HAS_CONTROLS = frozenset({Pipeline.CONTROLNET, Pipeline.CONTROLNET_IMG2IMG, Pipeline.CONTROLNET_INPAINT})


def pipelines_of(checkpoint: CheckpointEntry, *, has_controlnets: bool) -> list[Pipeline]:
    """Those that the checkpoint can run."""
    if is_for_inpainting(checkpoint):
        can = HAS_MASK
    elif checkpoint.wants_aesthetic_score:
        can = STARTS_FROM_IMAGE
    else:
        can = frozenset(Pipeline)
    return [pipeline for pipeline in Pipeline if pipeline in can and (has_controlnets or pipeline not in HAS_CONTROLS)]


def is_for_inpainting(checkpoint: CheckpointEntry) -> bool:
    """Its UNet takes mask and masked picture beside the latents, and cannot do without."""
    return checkpoint.unet_channels != checkpoint.shape.latent_channels


def pipeline_of(request: diffusion_pb2.GenerateRequest, checkpoint: CheckpointEntry, *, has_hole: bool) -> Pipeline:
    """`has_hole`: a ControlNet wants `image` and `mask` for itself, whatever the pipeline.

    NotFound for an unknown pipeline, InvalidField for one that does not fit the checkpoint or what else is set.
    """
    pipeline = _named(request.pipeline) if request.pipeline else _told(request)
    if pipeline not in pipelines_of(checkpoint, has_controlnets=True):
        can = ", ".join(pipelines_of(checkpoint, has_controlnets=True))
        raise InvalidField(f"is {pipeline}; the checkpoint {checkpoint.id} can {can} alone", field="pipeline")
    _check_needed(request, pipeline)
    _check_superfluous(request, pipeline, has_hole=has_hole)
    return pipeline


def _named(name: str) -> Pipeline:
    try:
        return Pipeline(name)
    except ValueError as error:
        raise NotFound(f"no such pipeline; there are {', '.join(Pipeline)}", field="pipeline") from error


def _told(request: diffusion_pb2.GenerateRequest) -> Pipeline:
    if request.HasField("mask"):
        return Pipeline.CONTROLNET_INPAINT if request.controls else Pipeline.INPAINT
    if request.HasField("image"):
        return Pipeline.CONTROLNET_IMG2IMG if request.controls else Pipeline.IMG2IMG
    return Pipeline.CONTROLNET if request.controls else Pipeline.TEXT2IMG


def _check_needed(request: diffusion_pb2.GenerateRequest, pipeline: Pipeline) -> None:
    if pipeline in HAS_CONTROLS and not request.controls:
        raise InvalidField(f"is empty; the pipeline {pipeline} needs a control", field="controls")
    if pipeline in STARTS_FROM_IMAGE and not request.HasField("image"):
        raise InvalidField(f"is missing; the pipeline {pipeline} starts from it", field="image")
    if pipeline in HAS_MASK and not request.HasField("mask"):
        raise InvalidField(f"is missing; the pipeline {pipeline} paints where it is white", field="mask")


def _check_superfluous(request: diffusion_pb2.GenerateRequest, pipeline: Pipeline, *, has_hole: bool) -> None:
    if pipeline not in HAS_CONTROLS and request.controls:
        raise InvalidField(f"{pipeline} takes no controls; leave it empty or name another", field="pipeline")
    if pipeline not in STARTS_FROM_IMAGE and request.HasField("image") and not has_hole:
        raise InvalidField(f"{pipeline} takes no image; leave it empty or name another", field="pipeline")
    if pipeline not in HAS_MASK and request.HasField("mask") and not has_hole:
        raise InvalidField(f"{pipeline} takes no mask; leave it empty or name another", field="pipeline")
    if pipeline not in STARTS_FROM_IMAGE and request.HasField("strength"):
        raise InvalidField(f"is for an image to start from, which {pipeline} does not", field="strength")
