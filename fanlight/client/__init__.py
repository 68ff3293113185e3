"""The Python client: `AsyncClient` for asyncio, `Client` for everything else."""

from fanlight.client.asynchronous import AsyncClient
from fanlight.client.blocking import Client
from fanlight.client.jobs import has_ended
from fanlight.client.requests import Control, Lora, annotation, generation
from fanlight.errors import BrokenBlob, CallFailed, FanlightError, InvalidInput, JobFailed

__all__ = [
    "AsyncClient",
    "Client",
    "Control",
    "Lora",
    "annotation",
    "generation",
    "has_ended",
    "FanlightError",
    "CallFailed",
    "JobFailed",
    "InvalidInput",
    "BrokenBlob",
]
