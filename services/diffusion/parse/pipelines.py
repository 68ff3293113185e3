"""Which pipelines a checkpoint can run, and whether a request's is one of them."""

from collections.abc import Collection

from fanlight.contract import generation as contract
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import InvalidField
from services.diffusion.generation import Pipeline
from services.diffusion.models.entries import CheckpointEntry


def pipelines_of(checkpoint: CheckpointEntry, *, has_controlnets: bool) -> list[Pipeline]:
    """Those that the checkpoint can run."""
    can: Collection[str] = tuple(Pipeline)
    if is_for_inpainting(checkpoint):
        can = contract.HAS_MASK
    elif checkpoint.wants_aesthetic_score:
        can = contract.STARTS_FROM_IMAGE
    without = frozenset[str]() if has_controlnets else contract.HAS_CONTROLS
    return [pipeline for pipeline in Pipeline if pipeline in can and pipeline not in without]


def is_for_inpainting(checkpoint: CheckpointEntry) -> bool:
    """Its UNet takes mask and masked picture beside the latents, and cannot do without."""
    return checkpoint.unet_channels != checkpoint.shape.latent_channels


def pipeline_of(request: diffusion_pb2.GenerateRequest, checkpoint: CheckpointEntry) -> Pipeline:
    """InvalidField for one that the checkpoint cannot run."""
    pipeline = Pipeline(contract.pipeline_of(request))
    if pipeline not in (can := pipelines_of(checkpoint, has_controlnets=True)):
        raise InvalidField(
            f"is {pipeline}; the checkpoint {checkpoint.id} can {', '.join(can)} alone", field="pipeline"
        )
    return pipeline
