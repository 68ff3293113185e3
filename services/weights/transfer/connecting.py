"""How downloads reach a server: directly or through the environment's proxy, and why it failed in a sentence.

All addresses of a name are tried, IPv6 and IPv4 beside each other (anyio). Knows no redirects and no tokens.
"""

from collections.abc import Iterable

from fanlight.errors import FanlightError
from fanlight.proxies import BadProxy, proxy_for, shown
from services.kernel.network import certificate_problem, tls_context
from services.kernel.process import without
from services.weights.errors import SourceFailed, Unreachable, Untrusted

# As in transfer/web.py.
with without("click"):
    import httpx

SocketOption = tuple[int, int, int]


class ProxyTransport(httpx.AsyncBaseTransport):
    """One pool of connections for direct ones and one for each proxy that the environment names."""

    def __init__(self, limits: httpx.Limits, socket_options: Iterable[SocketOption]) -> None:
        self._limits = limits
        self._socket_options = list(socket_options)
        self._pools: dict[str, httpx.AsyncHTTPTransport] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            proxy = proxy_for(str(request.url))
        except BadProxy as error:
            raise SourceFailed(f"{request.url.host} cannot be asked: {error}") from error
        try:
            return await self._pool(proxy).handle_async_request(request)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            raise _problem(error, request.url.host, shown(proxy)) from error

    def _pool(self, proxy: str) -> httpx.AsyncHTTPTransport:
        if proxy not in self._pools:
            tls = tls_context() if proxy.startswith("https://") else None
            try:
                self._pools[proxy] = httpx.AsyncHTTPTransport(
                    verify=tls_context(),
                    limits=self._limits,
                    socket_options=self._socket_options,
                    proxy=httpx.Proxy(proxy, ssl_context=tls) if proxy else None,
                )
            except ImportError as error:
                raise SourceFailed(
                    f"the proxy {shown(proxy)} speaks SOCKS, which needs socksio: pip install 'fanlight[weights]'"
                ) from error
        return self._pools[proxy]

    async def aclose(self) -> None:
        for pool in self._pools.values():
            await pool.aclose()


def _problem(error: httpx.TransportError, host: str, proxy: str) -> FanlightError:
    """`proxy`: its host and port; empty where there is none."""
    if told := certificate_problem(error, host):
        return Untrusted(told)
    if isinstance(error, httpx.ProxyError):
        what = " ".join(str(error).split())[:100]
        if what.startswith("407"):
            return SourceFailed(f"the proxy {proxy} wants a user and a password: http://USER:PASSWORD@{proxy}")
        kind = Unreachable if what.startswith("5") else SourceFailed
        return kind(f"the proxy {proxy} does not connect to {host}: {what}")
    if proxy:
        return Unreachable(f"{host} cannot be reached through the proxy {proxy}")
    return Unreachable(f"{host} cannot be reached")
