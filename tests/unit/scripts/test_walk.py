"""What a request walks through, measured in real services' processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_each_walk_enters_the_files_of_its_service():
    command = [sys.executable, "scripts/walk.py", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)

    assert done.returncode == 0, done.stderr
    walks = json.loads(done.stdout)
    rooms = {name: {str(Path(path).parent) for path in files} for name, files in walks.items()}
    assert "services/gateway/http" in rooms["post"]
    assert "services/gateway/rpc" in rooms["lease"]
    assert "services/gateway/http" not in rooms["lease"]
    assert "services/diffusion/engine" in rooms["run"]
    assert not any(room.startswith("services/gateway") for room in rooms["run"])
    files = {path for walk in walks.values() for path in walk}
    assert all((ROOT / path).is_file() for path in files)
    assert not any("_pb2" in path for path in files)
