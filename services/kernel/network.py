"""What all of a service's connections to the outside share: root certificates, proxies of S3, addresses in turn.

Which proxy leads where is in fanlight/proxies.py.
"""

import asyncio
import contextlib
import ipaddress
import os
import re
import ssl
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fanlight.errors import FailedPrecondition
from fanlight.proxies import SOCKS_SCHEMES, proxy_for

ROOTS_FILE = "SSL_CERT_FILE"
# What curl, Go and browsers wait for one address before they try the next one beside it (RFC 8305).
NEXT_ADDRESS_S = 0.25
AWS_URL = "https://s3.amazonaws.com"
_AMAZON = re.compile(r"(^|\.)amazonaws\.com(\.cn)?$")
REQUIRED_ONLY = "when_required"
# OpenSSL's codes of X509_V_ERR_*.
_TIMES = (9, 10)
_NAMES = (62, 63, 64)

Opened = TypeVar("Opened")


@cache
def tls_context() -> ssl.SSLContext:
    """Trusts the system's root certificates and certifi's; where SSL_CERT_FILE is set, those of that file instead.

    Loaded once: it is slow. FailedPrecondition if the file cannot be read.
    """
    file = os.environ.get(ROOTS_FILE, "")
    if not file:
        context = ssl.create_default_context()
        # Not every Python finds the system's certificates, and not every system has some.
        with contextlib.suppress(ImportError):
            import certifi

            context.load_verify_locations(certifi.where())
        return context
    try:
        return ssl.create_default_context(cafile=file)
    except (OSError, ssl.SSLError) as error:
        raise FailedPrecondition(f"{ROOTS_FILE}: {file} is no readable file of PEM certificates") from error


def certificate_problem(error: BaseException, host: str) -> str:
    """What is wrong with the server's certificate and what to do; empty where the error is about something else."""
    found = _verification_error(error)
    if found is None:
        return ""
    if found.verify_code in _NAMES:
        return f"{host} shows a certificate for another name: {found.verify_message}"
    if found.verify_code in _TIMES:
        return f"{host} shows a certificate of another time ({found.verify_message}): is this machine's clock right?"
    return (
        f"{host} shows a certificate that this machine does not trust ({found.verify_message}): "
        f"set {ROOTS_FILE} to a PEM file with its root certificate"
    )


def _verification_error(error: BaseException) -> ssl.SSLCertVerificationError | None:
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        if isinstance(each, ssl.SSLCertVerificationError):
            return each
        seen.add(id(each))
        waiting += [each.__cause__, each.__context__]
    return None


def s3_connection(endpoint: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of botocore's Config and of `create_client`, so that S3 uses the environment's proxy and certificates.

    A server that is not Amazon's gets only the checksums that it requires.

    BadProxy for a variable that names no proxy.
    """
    proxy = proxy_for(endpoint or AWS_URL)
    config: dict[str, Any] = {"proxies": {"http": proxy, "https": proxy} if proxy else {}}
    if proxy.split(":", 1)[0] in SOCKS_SCHEMES:
        config = {"proxies": {}, "http_session_cls": _socks_session(proxy)}
    if endpoint and not _AMAZON.search(urlsplit(endpoint).hostname or ""):
        # Other servers refuse the checksums that botocore adds since 1.36.
        config |= {"request_checksum_calculation": REQUIRED_ONLY, "response_checksum_validation": REQUIRED_ONLY}
    roots = os.environ.get(ROOTS_FILE, "")
    return config, {"verify": roots} if roots and "AWS_CA_BUNDLE" not in os.environ else {}


def _socks_session(proxy: str) -> type[Any]:
    """A session of aiobotocore through SOCKS: httpx can, and botocore's own configuration takes HTTP proxies only."""
    # Whichever httpx aiobotocore uses.
    from aiobotocore.httpxsession import HttpxSession, httpx

    class SocksSession(HttpxSession):  # type: ignore[misc]
        def _make_async_client(self) -> Any:
            return httpx.AsyncClient(
                timeout=self._timeout, limits=self._limits, verify=self._verify, proxy=proxy, trust_env=False
            )

    return SocksSession


def interleaved(addresses: Sequence[str]) -> list[str]:
    """The addresses without doubles, IPv6 and IPv4 in turns, so that one broken family delays little."""
    unique = list(dict.fromkeys(addresses))
    first = [each for each in unique if _version(each) == _version(unique[0])]
    second = [each for each in unique if _version(each) != _version(unique[0])]
    longer = max(len(first), len(second))
    return [each for at in range(longer) for each in (*first[at : at + 1], *second[at : at + 1])]


def _version(address: str) -> int:
    return ipaddress.ip_address(address.partition("%")[0]).version


async def first_of(
    addresses: Sequence[str],
    connect: Callable[[str], Awaitable[Opened]],
    *,
    close: Callable[[Opened], None],
    next_s: float = NEXT_ADDRESS_S,
) -> Opened:
    """The connection to the first address that answers: the next one is tried when one fails, or beside a slow one.

    `close`: of a connection that came too late. OSError of the last address where none answers.
    """
    waiting, running = list(addresses), set[asyncio.Task[Opened]]()
    failure: BaseException = OSError("there is no address")
    winner: asyncio.Task[Opened] | None = None
    try:
        while waiting or running:
            if waiting:
                running.add(asyncio.ensure_future(_started(connect, waiting.pop(0))))
            done, running = await asyncio.wait(
                running, timeout=next_s if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                if (error := task.exception()) is not None:
                    failure = error
                elif winner is None:
                    winner = task
                else:
                    close(task.result())
            if winner is not None:
                return winner.result()
        raise failure
    finally:
        for task in running:
            task.cancel()
        for late in await asyncio.gather(*running, return_exceptions=True):
            if not isinstance(late, BaseException):
                close(late)


async def _started(connect: Callable[[str], Awaitable[Opened]], address: str) -> Opened:
    return await connect(address)
