"""What clients ask for: protobuf to domain, every field checked."""

from fanlight.gateway.v1 import gateway_pb2
from services.gateway.app.new_job import NewJob
from services.gateway.jobs.model import JobState
from services.gateway.jobs.workers import Catalog


def new_job(request: gateway_pb2.CreateJobRequest, catalog: Catalog) -> NewJob:
    """InvalidField and NotFound name the field; Unavailable when no worker was ever seen for a stage it needs."""
    raise NotImplementedError


def job_state(state: "gateway_pb2.Job.State.ValueType") -> JobState | None:
    """None for unspecified."""
    raise NotImplementedError
