"""Which names a browser may use for this gateway, and from which pages it may be driven.

A page of anybody's can send requests to a gateway on loopback with the browser of whoever looks at it: under a name
that is rebound to 127.0.0.1, or as a form. Browsers say so in `Host`, `Origin` and `Sec-Fetch-Site`; other clients send
the first alone. Knows no tokens.
"""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import unquote

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fanlight.errors import FanlightError
from services.kernel.errors_wire import to_body
from services.kernel.grpc_server import is_loopback, split_address

SETTING = "FANLIGHT_GATEWAY_HTTP_NAMES"
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
DEFAULT_PORTS = {"http": 80, "https": 443}
QUOTED = 100
_AUTHORITY = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^\[\]:/@\\?#\s]+)(:(?P<port>[0-9]{1,5}))?")


class Misdirected(FanlightError):
    """A request for another host, or one that a page of another host sent."""

    code = "PERMISSION_DENIED"
    reason = "MISDIRECTED"
    is_final = True
    is_request_fault = True


@dataclass(frozen=True, slots=True)
class Authority:
    """HOST or HOST:PORT. The host is in lower case, without brackets and without a name's last dot."""

    host: str
    port: int | None

    def without_default_port(self, schemes: Iterable[str]) -> "Authority":
        return Authority(self.host, None) if self.port in {DEFAULT_PORTS[each] for each in schemes} else self


def parse_authority(text: str) -> Authority | None:
    """None for what is neither."""
    found = _AUTHORITY.fullmatch(text)
    if found is None:
        return None
    port = int(found["port"]) if found["port"] else None
    if port is not None and port > 65_535:
        return None
    host = found["host"].strip("[]").lower().removesuffix(".")
    if _is_address(host):
        return Authority(str(ipaddress.ip_address(host)), port)
    return None if found["host"].startswith("[") else Authority(host, port)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostNames:
    # Of this gateway; None: any, because a stranger's page cannot know a token.
    names: frozenset[str] | None = None
    # Of a reverse proxy in front of it, whatever `Host` it sends here.
    extra: frozenset[str] = frozenset()
    # Whether any IP address is a name as well: nobody can rebind one.
    any_address: bool = False
    # Whether `Origin` is compared with `Host`.
    checks_origin: bool = False

    def check(self, scope: Scope) -> None:
        """Misdirected for another host's request, and for a page of another host."""
        headers = Headers(scope=scope)
        host = _host_of(scope, headers)
        own = parse_authority(host) if host is not None else None
        is_named = own is not None and self._is_name(own.host)
        # HTTP/1.0 has no such header; no browser sends it.
        if self.names is not None and not is_named and not (host is None and scope["http_version"] == "1.0"):
            raise Misdirected(
                f"`Host` is {(host or '')[:QUOTED]!r}, which is not this gateway: use {_choice(self.names)}, or add"
                f" the name to {SETTING}"
            )
        if self.checks_origin:
            self._check_origin(scope["method"], headers, own)

    def _is_name(self, host: str) -> bool:
        return self.names is None or host in self.names or (self.any_address and _is_address(host))

    def _check_origin(self, method: str, headers: Headers, own: Authority | None) -> None:
        for origin in headers.getlist("origin"):
            if not self._is_own(origin, own):
                raise Misdirected(
                    f"`Origin` is {origin[:QUOTED]!r}: pages of other sites may not use this gateway; add a reverse"
                    f" proxy's name to {SETTING}"
                )
        site = headers.get("sec-fetch-site", "none")
        if "origin" not in headers and site not in ("none", "same-origin") and method not in SAFE_METHODS:
            raise Misdirected(f"`Sec-Fetch-Site` is {site[:QUOTED]!r}: pages of other sites may not use this gateway")

    def _is_own(self, origin: str, own: Authority | None) -> bool:
        scheme, _, rest = origin.partition("://")
        theirs = parse_authority(rest)
        if theirs is None or scheme not in DEFAULT_PORTS:
            return False
        if theirs.host in self.extra:
            return True
        # A proxy that ends TLS changes the scheme but not the name.
        return own is not None and own.without_default_port(DEFAULT_PORTS) == theirs.without_default_port([scheme])


def host_names(address: str, extra: Iterable[str], *, needs_token: bool) -> HostNames:
    """What a gateway that listens on `address` checks.

    Off loopback, with tokens and without extra names, nothing: a load balancer may send any name, and a page of
    another site can send no token.
    """
    extra = frozenset(each.lower().removesuffix(".") for each in extra)
    if not is_loopback(address) and not extra:
        return HostNames(checks_origin=not needs_token)
    names = LOOPBACK_NAMES | extra | {split_address(address)[0].lower()}
    return HostNames(names=names, extra=extra, any_address=not is_loopback(address), checks_origin=True)


def _host_of(scope: Scope, headers: Headers) -> str | None:
    """As the request's target names it, which counts before the header; None for neither."""
    return str(scope["authority"]) if "authority" in scope else headers.get("host")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _choice(names: frozenset[str]) -> str:
    return " or ".join(sorted(names))


class HostGuard:
    """403 for what the names refuse, except for health, which machines ask under any name.

    A request's target may be a whole URL; the application sees its path alone.
    """

    def __init__(self, app: ASGIApp, names: HostNames, open_paths: frozenset[str]) -> None:
        self._app = app
        self._names = names
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            scope = _with_path(scope)
            if scope["path"] not in self._open_paths:
                self._names.check(scope)
        except FanlightError as error:
            await JSONResponse(to_body(error), status_code=403)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _with_path(scope: Scope) -> Scope:
    """The scope of a target in absolute form, `GET http://host/path`, as RFC 9112 requires servers to take it."""
    raw = scope.get("raw_path") or b""
    scheme, found, rest = raw.partition(b"://")
    if raw.startswith(b"/") or not found or scheme.lower() not in (b"http", b"https"):
        return scope
    authority, slash, path = rest.partition(b"/")
    raw = slash + path or b"/"
    return {**scope, "authority": authority.decode("latin-1"), "raw_path": raw, "path": unquote(raw.decode("ascii"))}
