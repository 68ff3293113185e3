"""The contract is light: a client's check of a request needs protobuf alone."""

import pkgutil
import subprocess
import sys

from fanlight import contract


def test_it_loads_protobuf_and_no_grpc():
    modules = ", ".join(f"fanlight.contract.{each.name}" for each in pkgutil.iter_modules(contract.__path__))
    script = f"import {modules}, sys; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "google" in loaded
    assert loaded & {"grpc", "asyncio", "services", "numpy", "pydantic", "rich", "typer"} == set()
