"""Who makes a gRPC call, by the token in its metadata. The kernel's guard has refused tokens that are nobody's."""

from typing import Any

import grpc.aio

from fanlight.errors import Unauthenticated
from services.gateway.app.callers import Caller, Callers

Context = grpc.aio.ServicerContext[Any, Any]


def caller_of(callers: Callers, context: Context) -> Caller:
    """Unauthenticated for a token that only other services take."""
    sent = dict(context.invocation_metadata() or ()).get("authorization", "")
    caller = callers.of_authorization(sent if isinstance(sent, str) else "")
    if caller is None:
        raise Unauthenticated("send the right token as `authorization: bearer TOKEN`")
    return caller
