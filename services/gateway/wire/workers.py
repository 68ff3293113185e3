"""What workers say about themselves: protobuf to domain and back."""

import math
import re

from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.preprocessor.v1 import preprocessor_pb2
from fanlight.queue.v1 import queue_pb2
from services.gateway.jobs.workers import Annotator, Capabilities, Model, Worker
from services.gateway.wire import fields
from services.kernel.errors import InvalidField
from services.kernel.wire_parameters import described

NAME_LIMIT_BYTES = 256
OFFERS_LIMIT = 10_000
SLOTS_LIMIT = 1_024

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_STAGE = re.compile(r"[a-z0-9_-]{1,32}")


def polling_worker(message: queue_pb2.Worker, *, draining: bool) -> Worker:
    worker_id(message.id, field="worker.id")
    if not _STAGE.fullmatch(message.stage):
        raise InvalidField("must be 1 to 32 of a-z, 0-9, _ and -, such as preprocess", field="worker.stage")
    return Worker(
        id=message.id,
        node=fields.some_text(message.node, NAME_LIMIT_BYTES, field="worker.node"),
        stage=message.stage,
        version=fields.text(message.version, NAME_LIMIT_BYTES, field="worker.version"),
        device=fields.text(message.device, NAME_LIMIT_BYTES, field="worker.device"),
        slots=fields.whole(message.slots, 0, SLOTS_LIMIT, field="worker.slots"),
        vram_models=frozenset(message.vram_models),
        ram_models=frozenset(message.ram_models),
        disk_models=frozenset(message.disk_models),
        goodput_bps=_measured(message.goodput_bps),
        step_s=_measured(message.step_s),
        draining=draining,
        vram_bytes=max(0, message.vram_bytes),
        step_s_deviation=_measured(message.step_s_deviation),
        goodput_deviation_bps=_measured(message.goodput_deviation_bps),
        takes_fetches=message.takes_fetches,
        disk_bytes=max(0, message.disk_bytes),
        unfetched_models=frozenset(message.unfetched_models),
    )


def worker_id(text: str, *, field: str) -> str:
    if not _ID.fullmatch(text):
        raise InvalidField("must be 1 to 128 of letters, digits, . _ : and -", field=field)
    return text


def _measured(value: float) -> float:
    """0, which means unknown, for what nobody can have measured."""
    return value if math.isfinite(value) and value > 0 else 0.0


def worker(value: Worker) -> queue_pb2.Worker:
    return queue_pb2.Worker(
        id=value.id,
        node=value.node,
        stage=value.stage,
        version=value.version,
        device=value.device,
        slots=value.slots,
        vram_models=sorted(value.vram_models),
        ram_models=sorted(value.ram_models),
        disk_models=sorted(value.disk_models),
        goodput_bps=value.goodput_bps,
        step_s=value.step_s,
        vram_bytes=value.vram_bytes,
        step_s_deviation=value.step_s_deviation,
        goodput_deviation_bps=value.goodput_deviation_bps,
        takes_fetches=value.takes_fetches,
        disk_bytes=value.disk_bytes,
        unfetched_models=sorted(value.unfetched_models),
    )


def capabilities(message: queue_pb2.Capabilities) -> Capabilities:
    if len(message.annotators) + len(message.models) > OFFERS_LIMIT:
        raise InvalidField(f"has more than {OFFERS_LIMIT} annotators and models", field="capabilities")
    return Capabilities(
        annotators=tuple(
            _annotator(each, f"capabilities.annotators[{i}]") for i, each in enumerate(message.annotators)
        ),
        models=tuple(_model(each, f"capabilities.models[{i}]") for i, each in enumerate(message.models)),
    )


def _annotator(message: preprocessor_pb2.Annotator, field: str) -> Annotator:
    return Annotator(
        id=fields.some_text(message.id, NAME_LIMIT_BYTES, field=f"{field}.id"),
        description=message.description,
        parameters=tuple(
            described(each, field=f"{field}.parameters[{i}]") for i, each in enumerate(message.parameters)
        ),
        deterministic=message.deterministic,
        weight_bytes=message.weight_bytes,
        loaded=message.loaded,
        controlnets=tuple(message.controlnets),
        version=message.version,
        device=message.device,
        licence=message.licence,
        aliases=tuple(message.aliases),
    )


def _model(message: diffusion_pb2.Model, field: str) -> Model:
    return Model(
        id=fields.some_text(message.id, NAME_LIMIT_BYTES, field=f"{field}.id"),
        kind=fields.some_text(message.kind, NAME_LIMIT_BYTES, field=f"{field}.kind"),
        is_default=message.is_default,
        residency=int(message.residency),
        size_bytes=message.size_bytes,
        licence=message.licence,
        pipelines=tuple(message.pipelines),
        width_px=message.width_px,
        height_px=message.height_px,
        size_step_px=message.size_step_px,
        family=message.family,
        schedulers=tuple(message.schedulers),
        aliases=tuple(message.aliases),
    )
