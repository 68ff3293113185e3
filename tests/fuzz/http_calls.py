"""Random calls of every path in /openapi.json: schemathesis makes them up, valid and invalid ones."""

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import HypothesisException, NonInteractiveExampleWarning
from schemathesis import Case, GenerationMode

from services.gateway.http.credentials import COOKIE
from tests.fuzz.neighbors import NOBODY, OPERATOR, ROLES, SESSION, Neighbors

CALL_LIMIT_S = 1.0
# Not ready, and not done in the time that was given.
ANSWERS_THAT_ARE_NO_FAILURE = {503, 504}
NAMED_SHARE = 0.5
READ_MOST_BYTES = 1_000_000


def cases(document: Mapping[str, Any], *, count: int, of: int) -> list[Case]:
    """About so many, of every operation as many. `of`: the seed."""
    schema = schemathesis.openapi.from_dict(dict(document))
    operations = [found.ok() for found in schema.get_all_operations()]
    made: list[Case] = []
    each = max(1, count // len(operations))
    for operation in operations:
        # What has names in its path alone has no wrong form, and schemathesis searches long for one.
        modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE][: 2 if operation.body or operation.query else 1]
        for mode in modes:
            made += _some(operation, mode, count=max(1, each // len(modes)), of=of)
    return made


def _some(operation: Any, mode: GenerationMode, *, count: int, of: int) -> list[Case]:
    found: list[Case] = []

    @seed(of)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def collect(case: Case) -> None:
        found.append(case)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonInteractiveExampleWarning)
        try:
            collect()
        except (HypothesisException, schemathesis.errors.SchemathesisError):
            # Nothing of this mode can be made.
            return found
    return found[:count]


async def fuzz(found: Neighbors, *, calls: int, seed: int, roles: Sequence[str] = ROLES) -> list[str]:
    """What went wrong, a line each."""
    base = f"http://{found.gateway.http}"
    draw = random.Random(seed)
    wrong: list[str] = []
    async with httpx.AsyncClient(timeout=CALL_LIMIT_S) as client:
        document = (await client.get(f"{base}/openapi.json", headers=_proof(OPERATOR, found))).json()
        made = cases(document, count=calls, of=seed)
        draw.shuffle(made)
        for number in range(calls):
            case, role = made[number % len(made)], roles[number % len(roles)]
            asked = _request(_with_names(case, found.names_for(role), draw), base)
            if asked is None:
                continue
            headers = {**dict(asked.headers), **_proof(role, found)}
            body = asked.body if isinstance(asked.body, bytes) else (asked.body or "").encode()
            status, answered = await _send(client, str(asked.method), str(asked.url), headers, body)
            what = f"{asked.method} {asked.url} as {role}: {status} {answered[:300]!r}, asked {body[:600]!r}"
            if status >= 500 and status not in ANSWERS_THAT_ARE_NO_FAILURE:
                wrong.append(f"server error: {what}")
            said = body + repr((asked.url, headers)).encode() + requests.utils.unquote(str(asked.url)).encode()
            wrong += [f"leak of {secret!r}: {what}" for secret in found.leaked(role, said, answered)]
            if status == 401 and role in found.tokens and not await found.is_valid(role):
                await found.renew(role)
    return wrong


def _proof(role: str, found: Neighbors) -> dict[str, str]:
    if role == NOBODY:
        return {}
    if role == SESSION:
        return {"Cookie": f"{COOKIE}={found.tokens[role]}"}
    return {"Authorization": f"Bearer {found.tokens[role]}"}


def _request(case: Case, base: str) -> requests.PreparedRequest | None:
    """None for one that no client can send, such as a header with a line break."""
    try:
        prepared = requests.Request(**_known(case.as_transport_kwargs(base_url=base))).prepare()
    except (ValueError, TypeError, requests.RequestException):
        return None
    for name in ("Authorization", "Cookie", "X-Api-Key", "Salad-Api-Key", "apikey", "Content-Length", "Host"):
        prepared.headers.pop(name, None)
    return prepared


def _known(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in arguments.items()
        if name in ("method", "url", "headers", "files", "data", "params", "cookies", "json")
    }


async def _send(
    client: httpx.AsyncClient, method: str, url: str, headers: Mapping[str, str], body: bytes
) -> tuple[int, bytes]:
    """Its status, and every byte of it that came in time; 0 where none did."""
    status, text = 0, b""
    try:
        async with client.stream(method, url, headers=headers, content=body) as answer:
            status, text = answer.status_code, repr(answer.headers.raw).encode()
            async for chunk in answer.aiter_bytes():
                text += chunk
                if len(text) > READ_MOST_BYTES:
                    break
    except (httpx.TimeoutException, httpx.LocalProtocolError, UnicodeError):
        pass
    return status, text


def _with_names(case: Case, names: Sequence[str], draw: random.Random) -> Case:
    """Here and there, a name of something that there is."""
    for place in ("path_parameters", "query"):
        values = getattr(case, place)
        if isinstance(values, dict):
            for key in values:
                if draw.random() < NAMED_SHARE:
                    values[key] = draw.choice(names) or values[key]
    for holder, key in _texts(case.body):
        if draw.random() < NAMED_SHARE / 2:
            holder[key] = draw.choice(names)
    return case


def _texts(value: Any) -> Iterator[tuple[Any, Any]]:
    """Where the texts of a JSON value are."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        if isinstance(inner, str):
            yield value, key
        else:
            yield from _texts(inner)
