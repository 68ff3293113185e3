"""The gateway's own settings, `FANLIGHT_GATEWAY_*`. The ones that all services share are in the kernel."""

import os
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.kernel.config import MIB, Address

GIB = 1024 * MIB


def default_data_dir() -> Path:
    """As the XDG base directory specification says."""
    base = os.environ.get("XDG_DATA_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".local" / "share") / "fanlight"


class GatewaySettings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="FANLIGHT_GATEWAY_", extra="forbid", frozen=True)

    grpc: Address = Field("127.0.0.1:50051", description="Where gRPC listens.")
    http: Address = Field("127.0.0.1:8080", description="Where HTTP listens.")
    data_dir: Path = Field(
        default_factory=default_data_dir, description="Where jobs and blobs are kept; made if it is not there."
    )
    blob_budget_bytes: int = Field(20 * GIB, gt=0, description="How many bytes of blobs are kept.")
    blob_limit_bytes: int = Field(64 * MIB, gt=0, description="The largest blob that is taken.")
    picture_limit_bytes: int = Field(32 * MIB, gt=0, description="The largest picture that a job may name.")
    lease_ttl_s: float = Field(20.0, ge=1, le=3600, description="How long a lease lives without being renewed.")
    stall_limit_s: float = Field(
        3_600.0, gt=0, description="How long a task may be renewed without any progress before its lease is lost."
    )
    worker_live_s: float = Field(
        30.0, gt=0, description="How long after its last call a worker that holds no poll open counts as live."
    )
    worker_listed_s: float = Field(600.0, gt=0, description="How long a worker that went away is listed.")
    worker_retention_s: float = Field(
        86_400.0, gt=0, description="How long what a worker offered is remembered after it went away."
    )
    worker_limit: int = Field(10_000, gt=0, description="How many workers are remembered.")
    waiting_tasks_limit: int = Field(10_000, gt=0, description="How many tasks may wait before jobs are refused.")
    retry_after_s: float = Field(5.0, gt=0, description="When a refused client should ask again.")
    job_retention_s: float = Field(7 * 86_400.0, gt=0, description="How long an ended job is kept.")
    job_retention_count: int = Field(10_000, gt=0, description="How many ended jobs are kept.")
    cache_limit: int = Field(100_000, gt=0, description="How many control images the cache remembers.")
