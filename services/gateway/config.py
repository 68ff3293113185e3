"""The gateway's own settings, `FANLIGHT_GATEWAY_*`. Settings that all services share are in the kernel."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.kernel.config import MIB, Address, Addresses

GIB = 1024 * MIB


def default_data_dir() -> Path:
    """As the XDG base directory specification says."""
    base = os.environ.get("XDG_DATA_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".local" / "share") / "fanlight"


def _host_names(value: str) -> str:
    names = value.split(",") if value else []
    if not all(re.fullmatch(r"[A-Za-z0-9_.-]+|[0-9A-Fa-f:.]+", each) for each in names):
        raise ValueError("must be host names without a scheme or port, separated by commas, such as images.example.com")
    return value


HostNameList = Annotated[str, AfterValidator(_host_names)]


class GatewaySettings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="FANLIGHT_GATEWAY_", extra="forbid", frozen=True)

    grpc: Address = Field("127.0.0.1:50051", description="Where gRPC listens.")
    http: Address = Field("127.0.0.1:8080", description="Where HTTP listens.")
    http_names: HostNameList = Field(
        "",
        description="Other names that HTTP is reached by, such as a reverse proxy's, separated by commas. On loopback,"
        " requests for other names, and those of other sites' pages, are refused.",
    )
    worker_polls_limit: int = Field(
        10_000, gt=0, description="How many workers may wait for tasks at a time; other calls have places of their own."
    )
    address: Addresses | None = Field(
        None,
        description="HOST:PORT by which nodes reach gRPC, or several separated by commas. Part of join codes, so that a"
        " node needs nothing but its code.",
    )
    names: str = Field(
        "",
        description="Host names and addresses by which clients call the gateway, separated by commas: for the"
        " certificate that it makes itself.",
    )
    issuers_file: Path | None = Field(
        None, description="A file with the issuers whose tokens let nodes join (TOML); see operations.md."
    )
    credential_lifetime_s: float = Field(
        21_600.0,
        ge=20,
        le=30 * 86_400,
        description="How long a node's credential lives; it renews itself after half of that.",
    )
    data_dir: Path = Field(
        default_factory=default_data_dir, description="The folder of jobs and blobs; created if it does not exist."
    )
    store: str = Field(
        "sqlite",
        description="Where records are stored: `sqlite`, a file in the data folder, for one gateway; or `nats://HOST:PORT`,"
        " or several separated by commas, which any number of gateways share.",
    )
    nats_replicas: int = Field(1, ge=1, le=5, description="On how many NATS servers each record is stored.")
    nats_prefix: str = Field(
        "fanlight", pattern=r"^[A-Za-z0-9_-]{1,64}$", description="Prefix of the names of the gateway's NATS buckets."
    )
    nats_credentials_file: Path | None = Field(None, description="A NATS credentials file.")
    blobs: str = Field(
        "disk",
        description="Where blobs are stored: `disk`, in the data folder; a folder that several gateways share; or"
        " `s3://BUCKET/PREFIX`.",
    )
    s3_endpoint: str = Field("", description="The URL of an S3 server that is not Amazon's.")
    seal_key_file: Path | None = Field(
        None,
        description="A file with the operator's key, 64 hex digits (`openssl rand -hex 32`): what tenants wrote is"
        " sealed with data keys that it wraps. Unset: nothing is sealed.",
    )
    seal_kms: str = Field(
        "",
        description="In place of the key file, a key management service: NAME or NAME:ARGUMENT of an installed"
        " package's entry point `fanlight.key_wrappers`.",
    )
    seal_vault: Path | None = Field(
        None,
        description="The folder of the wrapped data keys; back it up apart from the data. Unset: beside the data"
        " folder, with `-keys` after its name; with NATS, a bucket of its own.",
    )
    s3_region: str = Field("", description="The S3 region.")
    tenants_file: Path | None = Field(
        None,
        description="A file with one tenant per line, NAME TOKEN; each tenant has its own jobs and blobs.",
    )
    tenant_pools: str = Field(
        "",
        pattern=r"^([a-z0-9-]+=[a-z0-9-]+(,[a-z0-9-]+=[a-z0-9-]+)*)?$",
        description="Tenants whose jobs only nodes of a pool may work on: TENANT=POOL, separated by commas.",
    )
    webhook_secret: SecretStr | None = Field(
        None,
        description="Signs webhooks: `whsec_` and base64. Unset: only tenants with a secret have webhooks.",
    )
    webhook_secret_file: Path | None = Field(None, description="A file with the secret that signs webhooks.")
    webhook_networks: str = Field(
        "", description="Private networks that webhooks may call, such as 10.1.0.0/16, separated by commas."
    )
    moderation_policy: str = Field(
        "off",
        pattern="^(off|flag|blur|block)$",
        description="What workers' safety checkers do with unsafe images of tenants that have no policy of their own:"
        " off, flag, blur or block. A request may ask for more, never for less.",
    )
    moderation_url: str = Field(
        "",
        description="Your own service that judges requests and results of tenants whose policy is not off: http://,"
        " https://, grpc://HOST:PORT or grpcs://HOST:PORT. Empty: none.",
    )
    moderation_secret: SecretStr | None = Field(
        None, description="Signs what the moderation is asked: `whsec_` and base64. Unset: it is not signed."
    )
    moderation_secret_file: Path | None = Field(None, description="A file with the secret that signs it.")
    moderation_networks: str = Field(
        "", description="Private networks that the moderation may be in, such as 127.0.0.0/8, separated by commas."
    )
    moderation_timeout_s: float = Field(
        10.0, ge=0.1, le=300, description="How long one verdict may take, with all repeats."
    )
    moderation_failure: str = Field(
        "closed",
        pattern="^(open|closed)$",
        description="What happens without a verdict. closed: the request is refused for now, and a result is withheld."
        " open: it passes, with the label `unjudged`.",
    )
    moderation_images: str = Field(
        "digest",
        pattern="^(digest|bytes)$",
        description="How images are sent to the moderation: by digest alone, or with their bytes.",
    )
    moderation_body_bytes: int = Field(
        16 * MIB,
        ge=1024,
        le=256 * MIB,
        description="How many bytes of images one question has; with more they are sent by digest alone.",
    )
    moderation_places: int = Field(
        8, ge=1, le=1000, description="How many requests and how many results of one tenant are judged at a time."
    )
    default_model: str = Field(
        "",
        description="The model of requests that name none. Unset: the starter model if a worker holds it, else the"
        " worker's default that was announced first.",
    )
    other_annotators: str = Field(
        "",
        description="Ids of annotators that do not ship with the gateway and that workers may offer, separated by"
        " commas; `*`: any.",
    )
    checked_share: float = Field(
        0.02,
        ge=0,
        le=1,
        description="Fraction of control images of deterministic annotators that a second node repeats, where another"
        " live one has the same build on the same kind of device. 0: none.",
    )
    checked_images_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Fraction of generated images that a second node generates again, where another live one has the"
        " same device; each costs a whole generation. They are compared by thumbnails. 0: none.",
    )
    blob_budget_bytes: int = Field(20 * GIB, gt=0, description="How many bytes of blobs are stored.")
    blob_limit_bytes: int = Field(64 * MIB, gt=0, description="The largest blob that is accepted.")
    image_limit_bytes: int = Field(32 * MIB, gt=0, description="The largest image that a job may name.")
    lease_ttl_s: float = Field(20.0, ge=1, le=3600, description="How long a lease lives without a renewal.")
    prefetch_speculative_share: float = Field(
        0.3,
        ge=0,
        le=1,
        description="Fraction of an idle worker's disk used for speculative prefetch of checkpoints without a replica."
        " 0: none.",
    )
    waiting_tasks_limit: int = Field(
        10_000, gt=0, description="How many tasks of one tenant may wait before its jobs are refused."
    )
    tenant_requests_per_s: float = Field(
        100.0,
        ge=0.1,
        le=1e6,
        description="How many calls a second one tenant may send, as the mean of ten seconds.",
    )
    tenant_streams: int = Field(200, ge=1, description="How many watches and waits one tenant may have at a time.")
    tenant_uploads: int = Field(32, ge=1, description="How many blobs one tenant may write at a time.")
    tenant_blob_bytes: int = Field(
        0,
        ge=0,
        description="How many bytes of blobs one tenant may have. 0: half of the gateway's budget.",
    )
    tenant_webhooks: int = Field(
        10_000, ge=0, description="How many webhooks of one tenant may wait for their delivery."
    )
    job_retention_s: float = Field(7 * 86_400.0, gt=0, description="How long an ended job is kept.")
    job_retention_count: int = Field(10_000, gt=0, description="How many ended jobs of one tenant are kept.")
    audit_retention_s: float = Field(
        400 * 86_400.0, ge=86_400, description="How long entries of the audit log are kept; a day at least."
    )
    audit_retention_count: int = Field(
        100_000, ge=100, le=1_000_000, description="How many entries of the audit log are kept."
    )
    cache_budget_bytes: int = Field(4 * GIB, gt=0, description="How many bytes of control images the cache keeps.")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayLimits:
    """Limits of the gateway that no operator sets."""

    # How many tasks of all tenants may wait.
    waiting_tasks_total: int = 200_000
    # How long a lease may be renewed without progress before it is lost. While the model is evaluated: so many times
    # the worker's measured time of an evaluation, at least the floor and at most the longest.
    stall_factor: float = 40.0
    stall_floor_s: float = 120.0
    # Before the first evaluation, after the last one, and where nothing was measured.
    stall_first_s: float = 1_800.0
    # Also of a task that waits while its worker's other tasks come further.
    stall_longest_s: float = 3_600.0
    # How long a worker without an open poll counts as live after its last call.
    worker_live_s: float = 30.0
    # How long a worker that went away is listed.
    worker_listed_s: float = 600.0
    # How long the offers of a worker that went away are remembered.
    worker_retention_s: float = 86_400.0
    # How many workers are remembered.
    worker_limit: int = 10_000
    # The most bytes of checkpoints that a worker prefetches per day.
    prefetch_day_bytes: int = 500 * GIB
    # After how long a refused client should retry.
    retry_after_s: float = 5.0
    # How many control images the cache keeps.
    cache_limit: int = 100_000
