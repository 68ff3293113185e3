import asyncio
import contextlib
import types

from services.diffusion.__main__ import preload
from services.diffusion.engine.engine import DeviceThread, DiffusionEngine
from tests.fakes.backend import FakeBackend


async def test_what_loads_weights_is_imported_while_they_still_come():
    loop, is_open = asyncio.get_running_loop(), asyncio.Event()
    backend, thread = FakeBackend(), DeviceThread()

    def open_studio():
        loop.call_soon_threadsafe(is_open.set)
        return backend

    class Slow:
        @contextlib.asynccontextmanager
        async def provided(self, request, report):
            # The download ends only when the backend is open.
            await asyncio.wait_for(is_open.wait(), 30)
            yield

    engine = DiffusionEngine(open_studio, thread=thread, rows_limit=1, hold_limit_s=0.0, clock=lambda: 0.0)
    catalog = types.SimpleNamespace(default=lambda: types.SimpleNamespace(id="sd15"))
    await preload(engine, catalog, Slow())
    thread.close()
    assert backend.loaded == ["sd15"]


async def test_a_default_model_that_cannot_be_had_ends_nothing():
    class Gone:
        @contextlib.asynccontextmanager
        async def provided(self, request, report):
            raise OSError("no network")
            yield

    thread = DeviceThread()
    engine = DiffusionEngine(FakeBackend, thread=thread, rows_limit=1, hold_limit_s=0.0, clock=lambda: 0.0)
    await preload(engine, types.SimpleNamespace(default=lambda: None), Gone())
    thread.close()
