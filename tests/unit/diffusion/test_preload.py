import asyncio
import contextlib
import types

import pytest

from services.diffusion.__main__ import preload
from services.diffusion.engine.engine import DeviceThread, DiffusionEngine
from services.kernel.config import ProcessEnd
from services.worker.device import DeviceLost
from tests.fakes.backend import FakeBackend


async def test_what_loads_weights_is_imported_while_they_still_come():
    loop, is_open = asyncio.get_running_loop(), asyncio.Event()
    backend, thread = FakeBackend(), DeviceThread()

    def open_studio():
        loop.call_soon_threadsafe(is_open.set)
        return backend

    stage = types.SimpleNamespace(is_loading=False)

    class Slow:
        @contextlib.asynccontextmanager
        async def provided(self, request, report):
            assert stage.is_loading
            # The download ends only when the backend is open.
            await asyncio.wait_for(is_open.wait(), 30)
            yield

    engine = DiffusionEngine(open_studio, thread=thread, rows_limit=1, hold_limit_s=0.0, clock=lambda: 0.0)
    catalog = types.SimpleNamespace(default=lambda: types.SimpleNamespace(id="sd15"))
    await preload(engine, catalog, Slow(), stage)
    assert not stage.is_loading
    thread.close()
    assert backend.loaded == ["sd15"]


async def test_a_default_model_that_cannot_be_had_ends_nothing():
    class Gone:
        @contextlib.asynccontextmanager
        async def provided(self, request, report):
            raise OSError("no network")
            yield

    thread, stage = DeviceThread(), types.SimpleNamespace(is_loading=False)
    engine = DiffusionEngine(FakeBackend, thread=thread, rows_limit=1, hold_limit_s=0.0, clock=lambda: 0.0)
    await preload(engine, types.SimpleNamespace(default=lambda: None), Gone(), stage)
    assert not stage.is_loading
    thread.close()


async def test_a_device_that_is_lost_while_models_are_loaded_ends_the_process_with_its_code():
    class Here:
        @contextlib.asynccontextmanager
        async def provided(self, request, report):
            yield

    def open_broken():
        raise DeviceLost("gone")

    thread, stage = DeviceThread(), types.SimpleNamespace(is_loading=False)
    engine = DiffusionEngine(open_broken, thread=thread, rows_limit=1, hold_limit_s=0.0, clock=lambda: 0.0)
    with pytest.raises(ExceptionGroup) as raised:
        await preload(engine, types.SimpleNamespace(default=lambda: None), Here(), stage)
    thread.close()
    assert raised.group_contains(DeviceLost)
    assert issubclass(DeviceLost, ProcessEnd)
    assert DeviceLost.exit_code == 75
