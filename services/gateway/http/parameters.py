"""Query parameters that several paths share."""

from typing import Annotated

from fastapi import Depends, Query, Request

from fanlight.contract.digests import parse_scope
from fanlight.errors import InvalidField
from services.gateway.app.callers import Caller

# How long a client may let an answer wait.
WAIT_LIMIT_S = 60.0

Wait = Annotated[float, Query(ge=0, le=WAIT_LIMIT_S, description="Seconds to wait for the job to end.")]
Scope = Annotated[str, Query(description="Whose blobs; empty means your own.")]


async def caller_of(request: Request) -> Caller:
    """As the token guard told; it stands before every path that asks."""
    caller = request.state.caller
    assert isinstance(caller, Caller)
    return caller


Asking = Annotated[Caller, Depends(caller_of)]


def refuse_unknown(request: Request) -> None:
    """InvalidField for a query parameter that the path does not have: it is a typing mistake that would go unseen."""
    known = [field.alias for field in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if name not in known:
            raise InvalidField(f"is not known; the parameters are {', '.join(known) or 'none'}", field=name)


def scope_of(text: str, caller: Caller) -> str:
    return caller.scope_of(parse_scope(text, field="scope"), field="scope")
