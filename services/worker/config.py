"""The settings of the lease loop, the same for every stage: `FANLIGHT_WORKER_*`."""

import socket

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.kernel.config import MIB, Addresses

# What a gateway hands over at most in one answer.
BATCH_TASKS_MAX = 64
# The longest that a gateway lets a worker wait.
POLL_WAIT_MAX_S = 60.0


class WorkerSettings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="FANLIGHT_WORKER_", extra="ignore", frozen=True)

    gateway: Addresses | None = Field(
        None,
        description="HOST:PORT of the gateway to lease tasks from; several IP addresses of gateways over one store with"
        " commas between. Unset: direct calls only.",
    )
    node: str = Field(
        default_factory=socket.gethostname,
        min_length=1,
        max_length=128,
        description="The machine's name, the same for all its workers. Unset: the host name.",
    )
    poll_wait_s: float = Field(
        20.0, ge=0, le=POLL_WAIT_MAX_S, description="How long the gateway may wait for a task before it answers."
    )
    batch_tasks: int = Field(16, ge=1, le=BATCH_TASKS_MAX, description="How many tasks to lease at a time at most.")
    report_every_s: float = Field(10.0, gt=0, description="How often a worker without a free slot reports itself.")
    progress_every_s: float = Field(0.5, gt=0, description="How often progress is sent at most.")
    retry_delay_max_s: float = Field(5.0, gt=0, description="The longest pause before a failed call is tried again.")
    hand_in_limit_s: float = Field(
        900.0, gt=0, description="How long a finished task is kept while it cannot be handed in."
    )
    input_bytes_max: int = Field(64 * MIB, ge=MIB, description="The largest input picture that is fetched.")
    input_cache_bytes: int = Field(64 * MIB, ge=0, description="How much of the last input pictures is kept in memory.")
