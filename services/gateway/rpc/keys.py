"""KeyService over gRPC: translates, calls, translates."""

from fanlight.errors import Unauthenticated
from fanlight.keys.v1 import keys_pb2, keys_pb2_grpc
from services.gateway.app.keys import Keys, PersonVerifier, require_proof
from services.gateway.app.peer_roles import Role, require_role
from services.gateway.app.tenants import Caller, Callers
from services.gateway.domain.keys import Right
from services.gateway.ports import Clock
from services.gateway.rpc.jobs import Context, caller_of
from services.gateway.wire import keys as wire
from services.kernel.grpc_admission import bearer_of


class KeyService(keys_pb2_grpc.KeyServiceServicer):
    def __init__(self, keys: Keys, callers: Callers, clock: Clock, verifier: PersonVerifier | None) -> None:
        """`verifier`: of people's tokens; None where no issuer is trusted for people."""
        self._keys, self._callers, self._clock, self._verifier = keys, callers, clock, verifier

    def _caller(self, context: Context) -> Caller:
        return caller_of(self._callers, context, Right.MANAGE)

    async def CreateKey(self, request: keys_pb2.CreateKeyRequest, context: Context) -> keys_pb2.CreateKeyResponse:
        made = await self._keys.create(
            self._caller(context),
            tenant=wire.tenant(request.tenant),
            role=wire.role(request.role),
            note=wire.note(request.note),
            ttl_s=wire.ttl_s(request.ttl_s),
        )
        return wire.created(made, now_s=self._clock.now_s())

    async def ListKeys(self, request: keys_pb2.ListKeysRequest, context: Context) -> keys_pb2.ListKeysResponse:
        size = wire.page_size(request)
        found = self._keys.page(
            self._caller(context),
            tenant=wire.tenant(request.tenant),
            with_ended=request.with_ended,
            before=request.page_token,
            limit=size,
        )
        return wire.page(found, size, now_s=self._clock.now_s())

    async def GetKey(self, request: keys_pb2.GetKeyRequest, context: Context) -> keys_pb2.Key:
        return wire.key(self._keys.get(self._caller(context), request.id), now_s=self._clock.now_s())

    async def RotateKey(self, request: keys_pb2.RotateKeyRequest, context: Context) -> keys_pb2.CreateKeyResponse:
        made = await self._keys.rotate(self._caller(context), request.id, overlap_s=wire.overlap_s(request))
        return wire.created(made, now_s=self._clock.now_s())

    async def RevokeKey(self, request: keys_pb2.RevokeKeyRequest, context: Context) -> keys_pb2.Key:
        return wire.key(await self._keys.revoke(self._caller(context), request.id), now_s=self._clock.now_s())

    async def OpenSession(self, request: keys_pb2.OpenSessionRequest, context: Context) -> keys_pb2.CreateKeyResponse:
        require_role(context.auth_context(), Role.CLIENT, Role.OPERATOR)
        if request.jwt and self._verifier is None:
            raise Unauthenticated("this gateway trusts no issuer for people: add [[people]] to its issuers' file")
        if request.jwt and self._verifier is not None:
            made = await self._keys.open_session_of(await self._verifier.verify_person(request.jwt))
        else:
            token = bearer_of(context)
            made = await self._keys.open_session(require_proof(self._callers.of_token(token)), token)
        return wire.created(made, now_s=self._clock.now_s())
