"""Asks the operator's moderation: over HTTP, signed as webhooks are and behind the same guards, or over gRPC.

Over gRPC the signature is about the question's id and time alone: TLS protects the rest. An answer that carries a
signature must have the right one.
"""

import asyncio
import base64
import hmac
import ipaddress
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import grpc
import grpc.aio

from fanlight.channel import Security, channel_options, system_roots
from fanlight.errors import FailedPrecondition, InvalidField, Unavailable
from fanlight.moderation.v1.moderation_pb2_grpc import ModerationServiceStub
from services.gateway.adapters.webhook_http import WebhookHttp
from services.gateway.app.moderation import ModerationOptions
from services.gateway.app.webhooks import Network, is_allowed, refuse_internal, signature_headers, signing_key
from services.gateway.config import GatewaySettings
from services.gateway.domain.moderation import ContentVerdict
from services.gateway.ports import ModerationHook, Question
from services.gateway.wire import moderation as wire
from services.kernel.config import MIB, SettingsError, secret_of

ANSWER_LIMIT_BYTES = 64 * 1024
# Of addresses that its name had.
CHANNELS_LIMIT = 4
# Webhooks' headers, which Standard Webhooks names.
ID, TIME, SIGNATURE = "webhook-id", "webhook-timestamp", "webhook-signature"
# Answers that a retry may change.
_BUSY = (408, 429)
_NOT_THERE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.ABORTED,
)


class HttpModeration:
    def __init__(self, url: str, http: WebhookHttp, key: bytes, now_s: Callable[[], float]) -> None:
        """`key`: signs; empty for no signatures."""
        self._url, self._http, self._key, self._now_s = url, http, key, now_s

    async def judge(self, question: Question) -> ContentVerdict:
        body = wire.body(question)
        headers = {ID: question.id}
        if self._key:
            headers = signature_headers(self._key, message_id=question.id, now_s=int(self._now_s()), body=body)
        answer = await self._http.ask(self._url, headers, body, answer_limit_bytes=ANSWER_LIMIT_BYTES)
        if answer.status >= 500 or answer.status in _BUSY:
            raise Unavailable(f"answers with HTTP {answer.status}")
        if not 200 <= answer.status < 300:
            raise FailedPrecondition(f"answers with HTTP {answer.status}")
        self._check(question, answer.headers, answer.body)
        return wire.verdict_of_body(answer.body)

    def _check(self, question: Question, headers: Mapping[str, str], body: bytes) -> None:
        """FailedPrecondition for a signature that is not this question's, or not with this gateway's key."""
        signed = headers.get(SIGNATURE, "")
        if not signed:
            return
        content = f"{question.id}.{headers.get(TIME, '')}.".encode() + body
        right = base64.b64encode(hmac.new(self._key, content, "sha256").digest()).decode()
        if not self._key or not any(hmac.compare_digest(f"v1,{right}", each) for each in signed.split(" ")):
            raise FailedPrecondition("answers with a wrong signature")


class GrpcModeration:
    """Names are resolved and checked for every new channel; a proxy is not used."""

    def __init__(
        self,
        address: str,
        *,
        is_secure: bool,
        allowed: Sequence[Network],
        key: bytes,
        now_s: Callable[[], float],
        limit_bytes: int,
    ) -> None:
        """`address`: HOST:PORT. `limit_bytes`: of a question."""
        self._address, self._allowed, self._key, self._now_s = address, tuple(allowed), key, now_s
        self._security = Security(roots=system_roots()) if is_secure else Security(is_plain_text=True)
        self._limit_bytes = limit_bytes
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def judge(self, question: Question) -> ContentVerdict:
        sent = {ID: question.id}
        if self._key:
            sent = signature_headers(self._key, message_id=question.id, now_s=int(self._now_s()), body=b"")
        stub = ModerationServiceStub(await self._channel(await self._resolve()))
        try:
            return wire.verdict(await stub.Judge(wire.question(question), metadata=tuple(sent.items())))
        except grpc.aio.AioRpcError as error:
            kind = Unavailable if error.code() in _NOT_THERE else FailedPrecondition
            raise kind(f"answers with {error.code().name}") from error

    async def _resolve(self) -> str:
        """The first address that may be called, as gRPC writes it."""
        host, _, port = self._address.rpartition(":")
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise Unavailable("its name cannot be resolved") from error
        for each in found:
            address = ipaddress.ip_address(str(each[4][0]).partition("%")[0])
            if is_allowed(address, self._allowed):
                return f"ipv4:{address}:{port}" if address.version == 4 else f"ipv6:[{address}]:{port}"
        raise FailedPrecondition("points to an internal address, which this gateway does not allow")

    async def _channel(self, target: str) -> grpc.aio.Channel:
        if target not in self._channels:
            if len(self._channels) >= CHANNELS_LIMIT:
                await self._channels.pop(next(iter(self._channels))).close()
            host = self._address.rpartition(":")[0].strip("[]")
            options: list[tuple[str, Any]] = [
                *channel_options(max_message_bytes=self._limit_bytes),
                ("grpc.default_authority", self._address),
                ("grpc.enable_http_proxy", 0),
            ]
            if self._security.is_plain_text:
                self._channels[target] = grpc.aio.insecure_channel(target, options)
            else:
                credentials = grpc.ssl_channel_credentials(self._security.roots)
                options.append(("grpc.ssl_target_name_override", host))
                self._channels[target] = grpc.aio.secure_channel(target, credentials, options)
        return self._channels[target]

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()


def hook_of(
    url: str, *, allowed: Sequence[Network], key: bytes, now_s: Callable[[], float], timeout_s: float, limit_bytes: int
) -> ModerationHook:
    """By the address: http, https, grpc, or grpcs for TLS. `limit_bytes`: of a question. ValueError."""
    parts = urlsplit(url)
    if parts.scheme in ("http", "https") and parts.hostname:
        refuse_internal(url, allowed, field=url)
        return HttpModeration(url, WebhookHttp(allowed, timeout_s=timeout_s), key, now_s)
    if parts.scheme not in ("grpc", "grpcs") or not parts.hostname or not parts.port or parts.path.strip("/"):
        raise ValueError("must be http://, https://, grpc://HOST:PORT or grpcs://HOST:PORT")
    refuse_internal(url, allowed, field=url)
    return GrpcModeration(
        parts.netloc,
        is_secure=parts.scheme == "grpcs",
        allowed=allowed,
        key=key,
        now_s=now_s,
        limit_bytes=limit_bytes,
    )


def moderation_of(settings: GatewaySettings) -> ModerationOptions:
    """SettingsError for a malformed address, secret or network."""
    secret = secret_of(settings.moderation_secret, settings.moderation_secret_file)
    setting = "FANLIGHT_GATEWAY_MODERATION_"
    try:
        allowed = tuple(ipaddress.ip_network(each.strip()) for each in settings.moderation_networks.split(",") if each)
    except ValueError as error:
        raise SettingsError(f"{setting}NETWORKS: {error}") from error
    try:
        key = signing_key(secret) if secret else b""
    except ValueError as error:
        raise SettingsError(f"{setting}SECRET: {error}") from error
    try:
        hook = hook_of(
            settings.moderation_url,
            allowed=allowed,
            key=key,
            now_s=time.time,
            timeout_s=settings.moderation_timeout_s,
            limit_bytes=settings.moderation_body_bytes + MIB,
        )
    except (ValueError, InvalidField) as error:
        raise SettingsError(f"{setting}URL: {error}") from error
    return ModerationOptions(
        hook=hook,
        content_of=wire.content_of,
        timeout_s=settings.moderation_timeout_s,
        fails_open=settings.moderation_failure == "open",
        sends_bytes=settings.moderation_images == "bytes",
        body_limit_bytes=settings.moderation_body_bytes,
        places=settings.moderation_places,
    )
