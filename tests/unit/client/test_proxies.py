"""Which proxy is used for which address, and for gRPC none inside."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from fanlight import proxies
from fanlight.channel import open_channel, proxy_options
from fanlight.proxies import BadProxy, is_inside, proxy_for
from tests.fakes.proxy import FakeProxy

P = "http://proxy.example:3128"
DIRECT = [("grpc.enable_http_proxy", 0)]


@pytest.mark.parametrize(
    ("url", "environ", "proxy"),
    [
        ("http://a.example/x", {}, ""),
        ("http://a.example/x", {"http_proxy": P}, P),
        ("http://a.example/x", {"HTTP_PROXY": P}, P),
        ("http://a.example/x", {"HTTP_PROXY": P, "REQUEST_METHOD": "GET"}, ""),
        ("http://a.example/x", {"https_proxy": P}, ""),
        ("https://a.example/x", {"HTTPS_PROXY": P}, P),
        ("https://a.example/x", {"ALL_PROXY": "socks5h://p:1080"}, "socks5h://p:1080"),
        ("https://a.example/x", {"all_proxy": "socks://p:1080"}, "socks5://p:1080"),
        ("https://a.example/x", {"all_proxy": P, "https_proxy": "http://other:1"}, "http://other:1"),
        ("https://a.example/x", {"https_proxy": "", "HTTPS_PROXY": P}, ""),
        ("http://a.example/x", {"http_proxy": "proxy.example:3128"}, P),
        ("http://127.0.0.1:8080/", {"http_proxy": P}, ""),
        ("http://[::1]:8080/", {"http_proxy": P}, ""),
        ("http://localhost/", {"http_proxy": P}, ""),
        ("http://10.0.0.7/", {"http_proxy": P}, P),
        ("http://10.0.0.7/", {"http_proxy": P, "no_proxy": "10.0.0.0/8"}, ""),
        ("http://10.0.0.7/", {"http_proxy": P, "NO_PROXY": "10.0.0.7"}, ""),
        ("http://[fd00::7]/", {"http_proxy": P, "NO_PROXY": "fd00::/8"}, ""),
        ("http://a.b.example/", {"http_proxy": P, "no_proxy": "x.org, b.example"}, ""),
        ("http://a.b.example/", {"http_proxy": P, "no_proxy": ".b.example"}, ""),
        ("http://a.b.example/", {"http_proxy": P, "no_proxy": "*.b.example"}, ""),
        ("http://ab.example/", {"http_proxy": P, "no_proxy": "b.example"}, P),
        ("http://A.Example:81/", {"http_proxy": P, "no_proxy": "a.example:81"}, ""),
        ("http://a.example:82/", {"http_proxy": P, "no_proxy": "a.example:81"}, P),
        ("http://a.example/", {"http_proxy": P, "no_proxy": "*"}, ""),
    ],
)
def test_the_environment_names_the_proxy(url, environ, proxy):
    assert proxy_for(url, environ) == proxy


@pytest.mark.parametrize("bad", ["socks4://p:1", "ftp://p:1", "http://", "http://user:secret@:3128", "http://p:xyz"])
def test_what_is_no_proxy_is_named_by_its_variable_and_keeps_its_password(bad):
    with pytest.raises(BadProxy, match="http_proxy names no proxy") as caught:
        proxy_for("http://a.example/", {"http_proxy": bad})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "environ", "options"),
    [
        ("127.0.0.1:50051", {"http_proxy": P}, DIRECT),
        ("localhost:50051", {"https_proxy": P}, DIRECT),
        ("[::1]:50051", {"http_proxy": P}, DIRECT),
        ("10.1.2.3:50051", {"http_proxy": P, "FANLIGHT_GRPC_PROXY": P}, DIRECT),
        ("192.168.1.5:50051", {"grpc_proxy": P}, DIRECT),
        ("100.64.0.9:50051", {"grpc_proxy": P}, DIRECT),
        ("[fd00::1]:50051", {"grpc_proxy": P}, DIRECT),
        ("gateway:50051", {"grpc_proxy": P}, DIRECT),
        ("attic.local:50051", {"grpc_proxy": P}, DIRECT),
        ("8.8.8.8:50051", {}, DIRECT),
        ("8.8.8.8:50051", {"HTTPS_PROXY": P}, [("grpc.http_proxy", P)]),
        ("8.8.8.8:50051", {"http_proxy": P, "no_proxy": "8.8.0.0/16"}, DIRECT),
        ("8.8.8.8:50051", {"http_proxy": P, "FANLIGHT_GRPC_PROXY": "off"}, DIRECT),
        ("8.8.8.8:50051", {"FANLIGHT_GRPC_PROXY": P}, [("grpc.http_proxy", P)]),
        ("8.8.8.8:50051", {"all_proxy": "socks5://p:1080"}, DIRECT),
        ("8.8.8.8:50051,8.8.4.4:50051", {"https_proxy": P}, DIRECT),
    ],
)
def test_grpc_uses_a_proxy_to_the_outside_only(address, environ, options):
    assert proxy_options(address, environ) == options


def test_a_setting_that_grpc_cannot_use_is_refused():
    with pytest.raises(ValueError, match="FANLIGHT_GRPC_PROXY must be http://HOST:PORT or off"):
        proxy_options("8.8.8.8:50051", {"FANLIGHT_GRPC_PROXY": "socks5://p:1080"})


@pytest.mark.parametrize(("address", "inside"), [("10.0.0.9", True), ("93.184.216.34", False)])
def test_a_name_is_inside_if_its_addresses_are(monkeypatch, address, inside):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", (address, 0))])
    assert is_inside("gateway.example") is inside


def test_a_name_that_only_the_proxy_may_know_is_outside(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert is_inside("gateway.example") is False


@pytest.fixture
def answering():
    """The port of a gRPC server that echoes."""
    handler = grpc.method_handlers_generic_handler(
        "a.B", {"C": grpc.unary_unary_rpc_method_handler(lambda body, _: body)}
    )
    server = grpc.server(__import__("concurrent.futures").futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(None)


async def echoed(address: str) -> bytes:
    async with open_channel(address, plain_text=True) as channel:
        return await channel.unary_unary("/a.B/C")(b"hello", timeout=20)


async def test_a_gateway_outside_is_reached_through_the_proxy_and_one_here_is_not(monkeypatch, answering):
    monkeypatch.setattr(proxies, "_resolved", lambda name: [])
    with FakeProxy() as proxy:
        proxy.lead("gateway.example", f"http://127.0.0.1:{answering}")
        monkeypatch.setenv("https_proxy", proxy.url())
        assert await echoed("gateway.example:50051") == b"hello"
        assert proxy.asked == ["gateway.example:50051"]
        # `localhost` has an IPv6 address, too, which refuses.
        assert await echoed(f"localhost:{answering}") == b"hello"
        assert await echoed(f"127.0.0.1:{answering}") == b"hello"
        assert proxy.asked == ["gateway.example:50051"]


PROGRAMS = (
    "fanlight.client",
    "fanlight.health",
    "fanlight.cli.main",
    "services.gateway.__main__",
    "services.worker.serve",
    "services.kernel.grpc_server",
    "services.preprocessor.__main__",
    "services.diffusion.__main__",
)


@pytest.mark.parametrize("module", PROGRAMS)
def test_grpc_asks_the_systems_resolver_in_every_program(module):
    watch = f"""
import importlib.abc, json, os, sys
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "grpc":
            print(json.dumps(os.environ.get("GRPC_DNS_RESOLVER")))
            os._exit(0)
sys.meta_path.insert(0, Watch())
import {module}
print(json.dumps("grpc was not imported"))
"""
    environ = {name: value for name, value in os.environ.items() if name != "GRPC_DNS_RESOLVER"}
    done = subprocess.run([sys.executable, "-c", watch], capture_output=True, text=True, check=True, env=environ)
    assert json.loads(done.stdout) in ("native", "grpc was not imported")


CALL = """
import asyncio, sys
from fanlight.channel import open_channel
async def main():
    async with open_channel(sys.argv[1], plain_text=True) as channel:
        print((await channel.unary_unary("/a.B/C")(b"hello", timeout=20)).decode())
asyncio.run(main())
"""
SERVE = """
import grpc, socket, sys, subprocess
from concurrent.futures import ThreadPoolExecutor
server = grpc.server(ThreadPoolExecutor(2))
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(
    "a.B", {"C": grpc.unary_unary_rpc_method_handler(lambda body, _: body)}),))
# The system sorts them.
dead, alive = [each[4][0] for each in socket.getaddrinfo("gateway.test", None, type=socket.SOCK_STREAM)]
port = server.add_insecure_port(f"{alive}:0")
server.start()
# A full queue that nobody serves drops what comes, as a dead address does.
hole = socket.create_server((dead, port), backlog=0)
held = []
for _ in range(3):
    held.append(socket.socket())
    held[-1].setblocking(False)
    held[-1].connect_ex((dead, port))
sys.exit(subprocess.run([sys.executable, "-c", sys.argv[1], f"gateway.test:{port}"]).returncode)
"""


def test_a_host_whose_first_address_is_dead_is_reached_at_its_second_one(tmp_path):
    """With a hosts file of its own."""
    unshare = shutil.which("unshare")
    if not unshare or subprocess.run([unshare, "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("takes a mount namespace")
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.2 gateway.test\n127.0.0.1 gateway.test\n")
    prepare = f'mount --bind "{hosts}" /etc/hosts && exec "$@"'
    command = [unshare, "-m", "sh", "-c", prepare, "sh", sys.executable, "-c", SERVE, CALL]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, cwd=Path(__file__).parents[3]
    )
    if "mount:" in done.stderr:
        pytest.skip("no mounts here")
    assert done.stdout == "hello\n", done.stderr
