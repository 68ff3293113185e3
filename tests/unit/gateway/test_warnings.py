"""What was done otherwise than a request may have meant comes back with its answer, whoever says it."""

from dataclasses import replace

from google.protobuf.json_format import MessageToDict

from fanlight.contract.warnings import WARNING_CHARACTERS_LIMIT, WARNINGS_LIMIT
from fanlight.queue.v1 import queue_pb2
from services.gateway.app.job_store import JOBS
from services.gateway.domain import machine, plan
from services.gateway.domain.job import Job, Lease, Output
from services.gateway.wire import answers, workers
from tests.fakes.jobs import blob, generation_plan


def finished(*, gateways: tuple[str, ...] = (), nodes: tuple[str, ...] = ()) -> Job:
    planned = replace(generation_plan(), warnings=gateways)
    job = plan.create(planned, job_id="j", request_id="", priority=0, now_s=1.0)
    job = machine.lease(job, 1, Lease(token="t", worker="w", node="n", time_s=1.0), now_s=1.0)
    output = Output(blob=blob("made"), width_px=8, height_px=8, warnings=nodes)
    return machine.complete(job, 1, "t", outputs=[output], spans=[], now_s=2.0)


def test_the_gateways_warnings_are_the_jobs_and_a_nodes_are_its_images() -> None:
    job = JOBS.decode(JOBS.encode(finished(gateways=("an open bracket",), nodes=("two layers",))))
    answer = MessageToDict(answers.job(job), preserving_proto_field_name=True)
    assert answer["warnings"] == ["an open bracket"]
    assert answer["images"][0]["warnings"] == ["two layers"]


def test_a_job_without_warnings_has_none() -> None:
    answer = MessageToDict(answers.job(finished()), preserving_proto_field_name=True)
    assert "warnings" not in answer
    assert "warnings" not in answer["images"][0]


def test_of_what_a_node_says_a_few_short_sentences_are_taken() -> None:
    output = queue_pb2.Output(warnings=["x" * 100_000, *map(str, range(1_000))])
    output.blob.scope, output.blob.digest = "default", blob("made").digest
    [reported] = workers.made(queue_pb2.CompleteTaskRequest(outputs=[output]))
    assert len(reported.warnings) == WARNINGS_LIMIT
    assert max(map(len, reported.warnings)) == WARNING_CHARACTERS_LIMIT
