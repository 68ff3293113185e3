"""Random calls with every role: no answer has another tenant's secrets, and none says that the server failed.

`make fuzz` makes 10,000 of them; here a few, from the same seed.
"""

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.fuzz import http_calls, rpc_calls
from tests.fuzz.neighbors import CANARY, VICTIM, neighbors

CALLS = int(os.environ.get("FUZZ_CALLS", "240"))
SEED = int(os.environ.get("FUZZ_SEED", "22"))


@pytest.mark.timeout(3_000)
@pytest.mark.parametrize("fuzz", [rpc_calls.fuzz, http_calls.fuzz], ids=["grpc", "http"])
async def test_no_call_of_any_role_leaks_or_fails(tmp_path: Path, fuzz: Callable[..., Awaitable[list[str]]]) -> None:
    async with neighbors(tmp_path) as found:
        wrong = await fuzz(found, calls=CALLS // 2, seed=SEED)
        log = (tmp_path / "gateway.log").read_text()
    assert wrong == [], "\n".join(wrong[:20])
    assert "Traceback" not in log


async def test_a_leak_would_be_seen(tmp_path: Path) -> None:
    async with neighbors(tmp_path) as found:
        assert found.leaked("read", b"", f"...{CANARY}...".encode()) == [CANARY.encode()]
        assert found.leaked("read", f"jobs of {VICTIM}".encode(), f"no {VICTIM}".encode()) == []
        # The operator's list has it, and so the check of what others get has something to find.
        found.tokens["read"] = found.tokens["operator"]
        wrong = await rpc_calls.fuzz(found, calls=300, seed=SEED, roles=["read"])
    assert any(line.startswith("leak of") for line in wrong)
