"""The Python client: `AsyncClient` for asyncio, `Client` for everything else."""

from fanlight.client.async_client import AsyncClient
from fanlight.client.requests import Control, Lora, annotation, generation
from fanlight.client.sync_client import Client
from fanlight.client.watch import has_ended, warnings_of
from fanlight.errors import BrokenBlob, CallFailed, FanlightError, InvalidInput, JobFailed

__all__ = [
    "AsyncClient",
    "Client",
    "Control",
    "Lora",
    "annotation",
    "generation",
    "has_ended",
    "warnings_of",
    "FanlightError",
    "CallFailed",
    "JobFailed",
    "InvalidInput",
    "BrokenBlob",
]
