"""The gateway's process: reads settings, wires objects, serves gRPC and HTTP until SIGTERM."""

import asyncio
import ipaddress
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fanlight.audit_log.v1 import audit_log_pb2
from fanlight.audit_log.v1.audit_log_pb2_grpc import add_AuditLogServiceServicer_to_server as add_audit_log
from fanlight.blobs.v1 import blobs_pb2, blobs_pb2_grpc
from fanlight.errors import FanlightError, Unavailable
from fanlight.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from fanlight.keys.v1 import keys_pb2, keys_pb2_grpc
from fanlight.nodes.v1 import nodes_pb2, nodes_pb2_grpc
from fanlight.queue.v1 import queue_pb2, queue_pb2_grpc
from fanlight.records.v1 import records_pb2, records_pb2_grpc
from fanlight.tenants.v1 import tenants_pb2, tenants_pb2_grpc
from services.gateway.adapters.disk_blobs import open_disk_blobs
from services.gateway.adapters.encryption import Encryption, encryption_of
from services.gateway.adapters.jwt_identity import IssuerRule, JwtVerifier, read_issuers, read_rules
from services.gateway.adapters.jwt_people import PeopleRule, PeopleVerifier
from services.gateway.adapters.key_vaults import BUCKET as VAULT_BUCKET
from services.gateway.adapters.key_vaults import FolderVault, StoreVault
from services.gateway.adapters.key_wrappers import key_wrapper
from services.gateway.adapters.moderation_hooks import moderation_of
from services.gateway.adapters.sealed_blobs import SealableBlobs, sealed_blobs
from services.gateway.adapters.sealed_store import SealedStore
from services.gateway.adapters.sqlite_store import TimeoutStore, open_sqlite_store
from services.gateway.adapters.webhook_http import WebhookHttp
from services.gateway.app.data_keys import DataKeys
from services.gateway.app.gateway import Gateway
from services.gateway.app.readiness import require_ready
from services.gateway.app.records import OtherFormatVersion
from services.gateway.app.sealing import require_keys
from services.gateway.app.tenants import Callers, Tenant, callers_of, check_tokens, read_tenants
from services.gateway.app.webhooks import WebhookOptions, signing_key
from services.gateway.config import GatewaySettings
from services.gateway.http.app import http_app
from services.gateway.http.bodies import HttpOptions
from services.gateway.http.hosts import host_names
from services.gateway.http.serving import bind_http, port_of, serve_http
from services.gateway.ports import KeyVault, RecordStore
from services.gateway.rpc.audit_log import AuditLogService
from services.gateway.rpc.blobs import BlobService
from services.gateway.rpc.jobs import JobService, QueueService
from services.gateway.rpc.keys import KeyService
from services.gateway.rpc.nodes import JoinAddress, NodeService
from services.gateway.rpc.principals import Principals
from services.gateway.rpc.records import RecordService
from services.gateway.rpc.tenants import TenantService
from services.gateway.wire.answers import payload
from services.gateway.wire.stages import images_of_task
from services.gateway.wire.thumbnails import thumbnail_request
from services.kernel import logs
from services.kernel.blobs import BlobStore
from services.kernel.config import MIB, GatewayCommonSettings, SettingsError, load, refuse_unknown, secret_of
from services.kernel.grpc_server import RpcServer, address_of, require_tokens
from services.kernel.health import READY, HealthState
from services.kernel.logs import get_logger
from services.kernel.private_files import UMASK, make_private
from services.kernel.process import leave, raise_open_files_limit, run

JOB_SERVICE = gateway_pb2.DESCRIPTOR.services_by_name["JobService"].full_name
QUEUE_SERVICE = queue_pb2.DESCRIPTOR.services_by_name["QueueService"].full_name
RECORD_SERVICE = records_pb2.DESCRIPTOR.services_by_name["RecordService"].full_name
POLL = f"/{QUEUE_SERVICE}/LeaseTasks"
NODE_SERVICE = nodes_pb2.DESCRIPTOR.services_by_name["NodeService"].full_name
KEY_SERVICE = keys_pb2.DESCRIPTOR.services_by_name["KeyService"].full_name
TENANT_SERVICE = tenants_pb2.DESCRIPTOR.services_by_name["TenantService"].full_name
AUDIT_LOG_SERVICE = audit_log_pb2.DESCRIPTOR.services_by_name["AuditLogService"].full_name
BLOB_SERVICE = blobs_pb2.DESCRIPTOR.services_by_name["BlobService"].full_name

log = get_logger()

# Those that take nodes' credentials; what a node may do in each is checked there.
FOR_NODES = frozenset({QUEUE_SERVICE, BLOB_SERVICE, NODE_SERVICE})
# What nodes send in one message; results and inputs are blobs, in chunks. 20,000 models that a node holds, or the
# previews of 200 tasks, are about 10 MiB.
NODES_MESSAGES = {QUEUE_SERVICE: 16 * MIB, NODE_SERVICE: MIB}
# Those that take API keys; what a key's role may do in each is checked there.
FOR_KEYS = frozenset({JOB_SERVICE, BLOB_SERVICE, RECORD_SERVICE, TENANT_SERVICE, AUDIT_LOG_SERVICE})
SQLITE = "sqlite"
DISK = "disk"
STORE_FILE = "gateway.sqlite"
BLOBS_FOLDER = "blobs"
# What Fanlight keeps in the data folder, which may hold more; the last two are `fanlight up`'s.
OWN_NAMES = (STORE_FILE, f"{STORE_FILE}-wal", f"{STORE_FILE}-shm", BLOBS_FOLDER, "logs", "up.lock")


STORE_UNAVAILABLE = HealthState(
    name="store_unavailable",
    message="its store does not answer, or accepts no writes; see its log",
    is_ready=False,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Who may call, by the settings and their files."""

    tenants: Sequence[Tenant]
    callers: Callers
    # Of nodes' tokens.
    issuers: Sequence[IssuerRule]
    # None where no issuer is trusted for people.
    people: PeopleVerifier | None


def _access_of(settings: GatewaySettings, common: GatewayCommonSettings) -> Access:
    """SettingsError for files that are wrong, and for tokens that are used twice or can be guessed."""
    tenants = read_tenants(settings.tenants_file)
    check_tokens(
        {
            "FANLIGHT_CLIENT_TOKEN": common.token_of_clients(),
            "FANLIGHT_WORKER_TOKEN": common.token_of_workers(),
            **{f"{settings.tenants_file}: {each.name}'s token": each.token for each in tenants},
        }
    )
    people = read_rules(settings.issuers_file, "people", PeopleRule)
    return Access(
        tenants=tenants,
        callers=callers_of(common.token_of_clients(), tenants),
        issuers=read_issuers(settings.issuers_file),
        people=PeopleVerifier(people) if people else None,
    )


class SystemClock:
    def now_s(self) -> float:
        return time.time()

    def monotonic_s(self) -> float:
        return time.monotonic()


async def serve(settings: GatewaySettings, common: GatewayCommonSettings, stop: asyncio.Event) -> None:
    _require_tokens(settings, common)
    _make_folder(settings)
    access = _access_of(settings, common)
    encryption = encryption_of(settings, common)
    async with _open_store(settings) as clear_store, _open_blobs(settings) as clear_blobs:
        keys = _data_keys(settings, clear_store)
        await _require_keys(clear_store, keys)
        store: RecordStore = SealedStore(clear_store, keys) if keys else clear_store
        blobs: BlobStore = sealed_blobs(clear_blobs, keys) if keys else clear_blobs
        gateway = Gateway(
            store=store,
            blobs=blobs,
            data_keys=keys,
            clock=SystemClock(),
            random_bytes=os.urandom,
            settings=settings,
            is_shared=settings.store != SQLITE,
            thumbnail=thumbnail_request(),
        )
        gateway.use_webhooks(_webhooks(settings, access.tenants))
        if settings.moderation_url:
            gateway.moderation.use(moderation_of(settings))
        gateway.keys.use_tokens(access.callers.tokens)
        try:
            await gateway.load()
        except OtherFormatVersion as error:
            raise SettingsError(_other_version(settings, error)) from error
        async with asyncio.TaskGroup() as group:
            group.create_task(gateway.run())
            await gateway.wait_until_ready()
            access = replace(access, callers=replace(access.callers, keys=gateway.keys))
            rpc = _rpc_server(gateway, blobs, settings, encryption, access)
            await _listen(gateway, blobs, rpc, settings, encryption, access, stop, group)


def _other_version(settings: GatewaySettings, error: OtherFormatVersion) -> str:
    if settings.store == SQLITE:
        place = str(settings.data_dir / STORE_FILE)
        way = f"move it away (mv {place} {place}.old), or name another folder: FANLIGHT_GATEWAY_DATA_DIR"
    else:
        place = f"{settings.store}, prefix {settings.nats_prefix}"
        way = "name another prefix: FANLIGHT_GATEWAY_NATS_PREFIX"
    return (
        f"{place}: another version of Fanlight wrote this store: its {error.message}."
        f" Let that version finish its jobs; then {way}"
    )


def _open_store(settings: GatewaySettings) -> AbstractAsyncContextManager[RecordStore]:
    """SettingsError for an unknown store, or one whose library is not installed."""
    if settings.store == SQLITE:
        return _patient(open_sqlite_store(settings.data_dir / STORE_FILE))
    servers = settings.store.split(",")
    if not all(server.startswith(("nats://", "tls://")) for server in servers):
        raise SettingsError(f"FANLIGHT_GATEWAY_STORE: must be {SQLITE} or nats://HOST:PORT")
    try:
        from services.gateway.adapters.nats_store import open_nats_store
    except ImportError as error:
        raise SettingsError("FANLIGHT_GATEWAY_STORE: NATS needs nats-py: pip install 'fanlight[nats]'") from error
    return open_nats_store(
        servers,
        prefix=settings.nats_prefix,
        replicas=settings.nats_replicas,
        credentials_file=settings.nats_credentials_file,
    )


@asynccontextmanager
async def _patient(opening: AbstractAsyncContextManager[RecordStore]) -> AsyncIterator[RecordStore]:
    async with opening as store:
        yield TimeoutStore(store)


def _data_keys(settings: GatewaySettings, store: RecordStore) -> DataKeys | None:
    """None where nothing is sealed. SettingsError for a key or a vault that cannot be used."""
    wrapper = key_wrapper(settings.seal_key_file, settings.seal_kms)
    if wrapper is None:
        return None
    if settings.store != SQLITE and settings.seal_vault is None:
        vault: KeyVault = StoreVault(store, f"{settings.store}, bucket {settings.nats_prefix}-{VAULT_BUCKET}")
    else:
        folder = settings.seal_vault or settings.data_dir.with_name(f"{settings.data_dir.name}-keys")
        try:
            vault = FolderVault(folder)
        except OSError as error:
            raise SettingsError(f"FANLIGHT_GATEWAY_SEAL_VAULT: {folder}: {error.strerror}") from error
    return DataKeys(vault, wrapper, SystemClock(), os.urandom)


async def _require_keys(store: RecordStore, keys: DataKeys | None) -> None:
    """SettingsError where the store is sealed and the keys do not open it. Retries until the store answers."""
    while True:
        try:
            return await require_keys(store, keys)
        except Unavailable as error:
            log.info("store_not_ready", message=error.message)
            await asyncio.sleep(error.retry_after_s or 1.0)


def _open_blobs(settings: GatewaySettings) -> AbstractAsyncContextManager[SealableBlobs]:
    """SettingsError for a bucket that cannot be used."""
    limit_bytes = settings.blob_limit_bytes
    if not settings.blobs.startswith("s3://"):
        folder = settings.data_dir / BLOBS_FOLDER if settings.blobs == DISK else Path(settings.blobs)
        if settings.blobs == DISK and settings.store != SQLITE:
            log.warning("blobs_not_shared", advice="set FANLIGHT_GATEWAY_BLOBS where several gateways share the store")
        return open_disk_blobs(folder, budget_bytes=settings.blob_budget_bytes, blob_limit_bytes=limit_bytes)
    try:
        from services.gateway.adapters.s3_blobs import open_s3_blobs
    except ImportError as error:
        raise SettingsError("FANLIGHT_GATEWAY_BLOBS: S3 needs aiobotocore: pip install 'fanlight[s3]'") from error
    return open_s3_blobs(
        settings.blobs, endpoint=settings.s3_endpoint, region=settings.s3_region, blob_limit_bytes=limit_bytes
    )


def _webhooks(settings: GatewaySettings, tenants: Sequence[Tenant]) -> WebhookOptions:
    """SettingsError for malformed secrets and networks."""
    try:
        allowed = tuple(ipaddress.ip_network(each.strip()) for each in settings.webhook_networks.split(",") if each)
    except ValueError as error:
        raise SettingsError(f"FANLIGHT_GATEWAY_WEBHOOK_NETWORKS: {error}") from error
    secret = secret_of(settings.webhook_secret, settings.webhook_secret_file)
    try:
        return WebhookOptions(
            sender=WebhookHttp(allowed),
            payload=payload,
            keys={each.name: signing_key(each.webhook_secret) for each in tenants if each.webhook_secret},
            default_key=signing_key(secret) if secret else b"",
            allowed=allowed,
        )
    except ValueError as error:
        raise SettingsError(f"FANLIGHT_GATEWAY_WEBHOOK_SECRET, or one in the tenants' file: {error}") from error


async def _listen(
    gateway: Gateway,
    blobs: BlobStore,
    rpc: RpcServer,
    settings: GatewaySettings,
    encryption: Encryption,
    access: Access,
    stop: asyncio.Event,
    group: asyncio.TaskGroup,
) -> None:
    """Answer calls until `stop`, then let running calls end."""
    common = encryption.settings_of(settings.http)
    app = http_app(gateway, blobs, _http_options(settings, access), access.people)
    grpc_address = address_of(settings.grpc, rpc.bind(settings.grpc))
    sockets = bind_http(settings.http)
    try:
        await rpc.start()
        group.create_task(serve_http(app, sockets, stop, common))
        await rpc.set_serving(True)
        print(f"ready grpc={grpc_address} http={address_of(settings.http, port_of(sockets))}", flush=True)  # noqa: T201
        await stop.wait()
    finally:
        gateway.drain()
        await rpc.stop()


def _http_options(settings: GatewaySettings, access: Access) -> HttpOptions:
    callers = access.callers
    extra = filter(None, settings.http_names.split(","))
    return HttpOptions(
        callers=callers,
        host_names=host_names(settings.http, extra, needs_token=bool(callers.tokens)),
        blob_limit_bytes=settings.blob_limit_bytes,
    )


def _rpc_server(
    gateway: Gateway,
    blobs: BlobStore,
    settings: GatewaySettings,
    encryption: Encryption,
    access: Access,
) -> RpcServer:
    common = encryption.settings_of(settings.grpc)
    callers, clock = access.callers, SystemClock()
    clients = tuple(callers.tokens)
    workers = tuple(filter(None, [common.token_of_workers()]))
    principals = Principals(callers, common.token_of_workers(), gateway.nodes)
    jobs, queue = JobService(gateway, callers), QueueService(gateway, principals)
    records = RecordService(gateway, callers)
    keys = KeyService(gateway.keys, callers, clock, access.people)
    tenants = TenantService(gateway, callers)
    audit_log = AuditLogService(gateway, callers)
    rights = gateway.lease_rights(images_of_task)
    blob = BlobService(blobs, principals, rights, gateway.quotas, gateway.deletions, gateway.audit)
    address = JoinAddress(
        gateway=settings.address or "", authority=encryption.authority, is_own=encryption.has_own_name
    )
    node = NodeService(gateway, callers, clock, address, JwtVerifier(access.issuers) if access.issuers else None)
    return RpcServer(
        common,
        services={
            JOB_SERVICE: lambda server: gateway_pb2_grpc.add_JobServiceServicer_to_server(jobs, server),
            QUEUE_SERVICE: lambda server: queue_pb2_grpc.add_QueueServiceServicer_to_server(queue, server),
            RECORD_SERVICE: lambda server: records_pb2_grpc.add_RecordServiceServicer_to_server(records, server),
            BLOB_SERVICE: lambda server: blobs_pb2_grpc.add_BlobServiceServicer_to_server(blob, server),
            NODE_SERVICE: lambda server: nodes_pb2_grpc.add_NodeServiceServicer_to_server(node, server),
            KEY_SERVICE: lambda server: keys_pb2_grpc.add_KeyServiceServicer_to_server(keys, server),
            AUDIT_LOG_SERVICE: lambda server: add_audit_log(audit_log, server),
            TENANT_SERVICE: lambda server: tenants_pb2_grpc.add_TenantServiceServicer_to_server(tenants, server),
        },
        # NodeService looks itself: a node that joins has no token yet. So does KeyService, where people sign in.
        tokens={
            JOB_SERVICE: clients,
            QUEUE_SERVICE: workers,
            RECORD_SERVICE: clients,
            TENANT_SERVICE: clients,
            AUDIT_LOG_SERVICE: clients,
            NODE_SERVICE: (),
            KEY_SERVICE: (),
        },
        default_tokens=clients + workers,
        message_limits=NODES_MESSAGES,
        places={POLL: settings.worker_polls_limit},
        get_health=lambda: _health_of(gateway),
        accepts=lambda service, token: (
            (service in FOR_NODES and gateway.nodes.of_credential(token) is not None)
            or (service in FOR_KEYS and gateway.keys.caller_of(token) is not None)
        ),
    )


async def _health_of(gateway: Gateway) -> HealthState:
    """Not ready, and alive all the same, where its store fails: a restart would not mend that."""
    try:
        await require_ready(gateway)
    except FanlightError:
        return STORE_UNAVAILABLE
    return READY


def _require_tokens(settings: GatewaySettings, common: GatewayCommonSettings) -> None:
    """SettingsError where tokens are incomplete, so that some calls would need none.

    Nodes need none here, because each has a credential of its own. A certificate is none either: it says in which role
    a caller connects.
    """
    client, worker = common.token_of_clients(), common.token_of_workers()
    if settings.tenants_file is not None and not client:
        raise SettingsError("tenants need FANLIGHT_CLIENT_TOKEN, the operator's, beside theirs")
    if worker and not client:
        raise SettingsError("FANLIGHT_WORKER_TOKEN: set FANLIGHT_CLIENT_TOKEN too (or a _FILE of each), or none")
    if client and client == worker:
        raise SettingsError("FANLIGHT_WORKER_TOKEN: must be another one than FANLIGHT_CLIENT_TOKEN")
    if common.tls_client_ca_file is not None and not client:
        raise SettingsError(
            "FANLIGHT_TLS_CLIENT_CA_FILE: set FANLIGHT_CLIENT_TOKEN too (or a _FILE): a certificate replaces no token"
        )
    for address in (settings.grpc, settings.http):
        require_tokens(address, {"FANLIGHT_CLIENT_TOKEN": client})


def _make_folder(settings: GatewaySettings) -> None:
    try:
        make_private(settings.data_dir, OWN_NAMES)
    except OSError as error:
        raise SettingsError(f"{settings.data_dir}: cannot be created: {error.strerror}") from error


def main() -> int:
    # Every file of the gateway is its user's alone, also those that libraries make.
    os.umask(UMASK)
    try:
        refuse_unknown(GatewayCommonSettings, GatewaySettings)
        common, settings = load(GatewayCommonSettings), load(GatewaySettings)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    raise_open_files_limit()
    logs.configure(level=common.log_level, style=common.log_format, service="gateway")
    return run(lambda stop: serve(settings, common, stop), lifeline_fd=common.lifeline_fd)


if __name__ == "__main__":
    leave(main())
