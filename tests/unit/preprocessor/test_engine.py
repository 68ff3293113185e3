"""Annotations run on the engine's own threads, and a cancelled one keeps its slot until it ends."""

import asyncio
import gc
from dataclasses import replace

import numpy as np
import pytest

from services.kernel.images import ImageLimits
from services.preprocessor import annotation
from services.preprocessor.annotation import Annotation
from services.preprocessor.engine import AnnotationEngine, AnnotationTimes
from services.worker.device import DeviceLost
from tests.fakes.annotators import PATIENCE_S, Gate
from tests.fakes.hanging import FakeHangWatch
from tests.fakes.synthetic_images import encoded, scene


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.opened.set()


@pytest.fixture
def engine():
    engine = AnnotationEngine(threads=2, limits=ImageLimits())
    yield engine
    engine.close()


def asked(gate: Gate) -> Annotation:
    return Annotation(annotator=gate.annotator(), parameters={}, image=encoded(scene(8, 8)))


async def started(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.started.acquire, True, PATIENCE_S)


async def test_the_event_loop_stays_free_while_two_run_and_a_third_waits(gate, engine):
    runs = [asyncio.create_task(engine.run(asked(gate))) for _ in range(3)]
    await started(gate)
    await started(gate)
    assert len(gate.threads) == 2
    gate.opened.set()
    assert [control.width_px for control in await asyncio.gather(*runs)] == [8, 8, 8]
    assert all(name.startswith("annotate") for name in gate.threads)


async def test_a_cancelled_annotation_ends_with_its_current_step(gate, engine):
    run = asyncio.create_task(engine.run(asked(gate)))
    await started(gate)
    run.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not run.done()
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert (await engine.run(asked(gate))).height_px == 8


async def test_asyncio_does_not_complain_about_a_cancelled_annotation(gate, engine):
    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda _, complaint: complaints.append(complaint))
    run = asyncio.create_task(engine.run(asked(gate)))
    await started(gate)
    run.cancel()
    await asyncio.sleep(0)
    gate.opened.set()
    await asyncio.wait([run])
    del run
    gc.collect()
    assert not complaints


async def test_a_decoding_that_is_cancelled_ends_before_its_slot_is_free(gate, engine, monkeypatch):
    monkeypatch.setattr(annotation, "decode", lambda data, **_: gate._apply(np.zeros((1, 1, 3), np.uint8)))
    decoding = asyncio.create_task(engine.decode([asked(gate)]))
    await started(gate)
    decoding.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not decoding.done()
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await decoding


async def test_an_annotation_that_is_cancelled_before_its_turn_never_starts(gate, engine):
    running = [asyncio.create_task(engine.run(asked(gate))) for _ in range(2)]
    await started(gate)
    await started(gate)
    waiting = asyncio.create_task(engine.run(asked(gate)))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.sleep(0)
    gate.opened.set()
    await asyncio.gather(*running)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert len(gate.threads) == 2


async def test_an_annotation_that_hangs_is_left_and_blames_the_annotator(gate):
    watch, lost = FakeHangWatch(), []
    engine = AnnotationEngine(threads=1, limits=ImageLimits(), watch=watch, on_lost=lost.append)
    run = asyncio.create_task(engine.run(asked(gate)))
    await started(gate)
    watch.hurry()
    with pytest.raises(DeviceLost) as caught:
        await run
    assert caught.value.part == f"annotator:{gate.annotator().id}"
    assert lost == [caught.value]
    assert watch.waited_s >= 0.9 * watch.limits.first_s
    # Its thread still runs, and is not waited for.
    engine.close()


@pytest.mark.parametrize(("took_s", "limit_s"), [(None, 600.0), (0.5, 60.0), (10.0, 200.0), (100.0, 600.0)])
async def test_the_limit_of_an_annotation_follows_its_longest_one(gate, took_s, limit_s):
    times = AnnotationTimes()
    if took_s is not None:
        times.note("gate", took_s)
        times.note("gate", took_s / 10)
    engine = AnnotationEngine(threads=1, limits=ImageLimits())
    engine._times = times
    annotator = gate.annotator()
    assert times.longest_s("gate") == took_s
    assert engine._limit_s(replace(annotator, id="gate")) == limit_s
    engine.close()
