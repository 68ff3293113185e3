"""What the largest requests were made from, as the worker writes it, is taken by a real gateway."""

import json

import pytest
from google.protobuf.struct_pb2 import Struct

from fanlight.channel import open_channel
from fanlight.contract.generation import check
from fanlight.contract.limits import (
    CONTROLS_LIMIT,
    NAME_LIMIT_BYTES,
    PARAMETERS_LIMIT_BYTES,
    PROVENANCE_LIMIT_BYTES,
)
from fanlight.diffusion.v1.diffusion_pb2 import AnnotatorUse, Control, GenerateRequest
from fanlight.gateway.v1 import gateway_pb2
from fanlight.queue.v1 import queue_pb2, queue_pb2_grpc
from services.diffusion.parse.parser import effective_to_proto
from services.diffusion.provenance import FileDigest, entries_of, for_record, provenance_json
from services.gateway.domain.job import DIFFUSION
from tests.fakes.corpus import CORPUS, IMAGE, LONGEST_PROMPT
from tests.fakes.fleet import Fleet, _once, generation
from tests.fakes.gateway_process import jobs_of, result
from tests.fakes.rpc_gateway import serving

# A character of one byte that takes six as JSON.
CONTROL_CHARACTER = "\x01"


def largest_parameters() -> Struct:
    parameters = Struct()
    parameters.update({"x": CONTROL_CHARACTER * 4_000})
    left = PARAMETERS_LIMIT_BYTES - parameters.ByteSize()
    parameters.update({"x": CONTROL_CHARACTER * (4_000 + left)})
    assert parameters.ByteSize() == PARAMETERS_LIMIT_BYTES
    return parameters


def largest_request() -> GenerateRequest:
    made_by = AnnotatorUse(annotator=CONTROL_CHARACTER * NAME_LIMIT_BYTES, parameters=largest_parameters())
    controls = [Control(controlnet="canny", image=IMAGE, made_by=made_by)] * CONTROLS_LIMIT
    request = GenerateRequest(prompt=LONGEST_PROMPT, negative_prompt=LONGEST_PROMPT, controls=controls)
    check(request)
    return request


def provenance_of(request: GenerateRequest, parser, *, files: int = 3) -> str:
    made = parser.parse(request)
    digests = tuple(FileDigest(path=f"unet/part-{number:06}.safetensors", sha256="0" * 64) for number in range(files))
    entries = tuple(entries_of(made))
    return provenance_json(
        made, effective_to_proto(made), entries, lambda entry: digests, device="cpu", dtype="float32"
    )


def longest_prompts() -> GenerateRequest:
    return next(case.build() for case in CORPUS if case.name == "the prompts that are longest as JSON")


@pytest.mark.parametrize("build", [longest_prompts, largest_request])
async def test_the_result_of_the_largest_request_can_be_handed_in(build, parser):
    provenance = provenance_of(build(), parser)
    assert len(provenance) > 150_000
    fleet = Fleet()
    async with fleet.running(), serving(fleet) as address, open_channel(address) as channel:
        painter = fleet.worker(DIFFUSION)
        await painter.come()
        created = await fleet.gateway.jobs.create(generation(workers=None))
        [task] = await painter.lease()
        facts = task.job.requests[0].facts
        side_px = facts.width_px or 64
        written = await fleet.blobs.write(task.job.tenant, _once(result(side_px, side_px, b"image")))
        output = queue_pb2.Output(width_px=side_px, height_px=side_px, provenance_json=for_record(provenance))
        output.blob.scope, output.blob.digest = task.job.tenant, written.digest
        queue = queue_pb2_grpc.QueueServiceStub(channel)
        await queue.CompleteTask(queue_pb2.CompleteTaskRequest(lease_token=task.token.encode(), outputs=[output]))
        job = await jobs_of(channel).GetJob(gateway_pb2.GetJobRequest(name=created.name))
    assert job.state == gateway_pb2.Job.STATE_SUCCEEDED
    assert json.loads(provenance)["parameters"]["prompt"] == LONGEST_PROMPT
    assert job.images[0].provenance_json == ""


def test_a_provenance_that_fits_a_record_stands_there_whole(parser):
    short = provenance_of(GenerateRequest(prompt="a cup"), parser)
    assert for_record(short) == short
    assert (len(for_record("x" * PROVENANCE_LIMIT_BYTES)), for_record("x" * (PROVENANCE_LIMIT_BYTES + 1))) == (
        PROVENANCE_LIMIT_BYTES,
        "",
    )
