"""What clients are told: domain to protobuf."""

from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.gateway.v1 import gateway_pb2
from fanlight.preprocessor.v1 import preprocessor_pb2
from services.gateway.app.jobs import Progress
from services.gateway.jobs.model import Job
from services.gateway.jobs.workers import Annotator, Model, WorkerStatus


def job(value: Job) -> gateway_pb2.Job:
    raise NotImplementedError


def event(value: Job | Progress) -> gateway_pb2.JobEvent:
    raise NotImplementedError


def annotator(value: Annotator) -> preprocessor_pb2.Annotator:
    raise NotImplementedError


def model(value: Model) -> diffusion_pb2.Model:
    raise NotImplementedError


def worker_status(value: WorkerStatus) -> gateway_pb2.WorkerStatus:
    raise NotImplementedError
