"""The gateway's own settings, `FANLIGHT_GATEWAY_*`. The ones that all services share are in the kernel."""

import os
from pathlib import Path

from pydantic import Field, SecretStr
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
    store: str = Field(
        "sqlite",
        description="Where records are kept: `sqlite`, a file in the data folder for one gateway; or `nats://HOST:PORT`"
        ", several with commas between, which any number of gateways share.",
    )
    nats_replicas: int = Field(1, ge=1, le=5, description="On how many NATS servers every record is kept.")
    nats_prefix: str = Field(
        "fanlight", pattern=r"^[A-Za-z0-9_-]{1,64}$", description="What the names of our NATS buckets begin with."
    )
    nats_credentials_file: Path | None = Field(None, description="A NATS credentials file.")
    blobs: str = Field(
        "disk",
        description="Where blobs are kept: `disk`, in the data folder; a folder that several gateways share; or"
        " `s3://BUCKET/PREFIX`.",
    )
    s3_endpoint: str = Field("", description="The S3 server's URL, where it is not Amazon's.")
    s3_region: str = Field("", description="The S3 region.")
    tenants_file: Path | None = Field(
        None, description="Lines of NAME TOKEN: tenants beside the operator, each with jobs and blobs of its own."
    )
    webhook_secret: SecretStr | None = Field(
        None, description="What webhooks are signed with: `whsec_` and base64. Unset: only tenants with their own."
    )
    webhook_secret_file: Path | None = Field(None, description="A file with the webhooks' secret.")
    webhook_networks: str = Field(
        "", description="Inward networks that webhooks may lead to, such as 10.1.0.0/16, with commas between."
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
    prefetch_day_bytes: int = Field(
        500 * GIB, ge=0, description="How many bytes of checkpoints a worker is told to fetch ahead in a day at most."
    )
    prefetch_unasked_share: float = Field(
        0.3,
        ge=0,
        le=1,
        description="Up to which part of its disk an idle worker of a fleet fetches offered checkpoints that no worker"
        " holds and nobody has asked for yet. 0: none.",
    )
    waiting_tasks_limit: int = Field(10_000, gt=0, description="How many tasks may wait before jobs are refused.")
    retry_after_s: float = Field(5.0, gt=0, description="When a refused client should ask again.")
    job_retention_s: float = Field(7 * 86_400.0, gt=0, description="How long an ended job is kept.")
    job_retention_count: int = Field(10_000, gt=0, description="How many ended jobs are kept.")
    cache_budget_bytes: int = Field(
        4 * GIB, gt=0, description="How many bytes the control images may have that the cache remembers."
    )
    cache_limit: int = Field(100_000, gt=0, description="How many control images the cache remembers.")
