"""What workers do not use is listed for the operator: bounded, printable, with the nodes that have it."""

import pytest

from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import NotFound
from fanlight.queue.v1 import queue_pb2
from services.gateway.app.capabilities import LEFT_OUT_LISTED, NODES_LIMIT, CapabilityGroups
from services.gateway.app.records import Records
from services.gateway.domain.fleet_catalog import FleetCatalog
from services.gateway.domain.offers import OfferRules
from services.gateway.domain.workers import AnnouncedLeftOut, AnnouncedModel, Capabilities
from services.gateway.wire import needs, workers
from tests.fakes.fleet import FakeClock
from tests.fakes.memory_store import MemoryStore


def taken(*left_out, count=0):
    return workers.capabilities(queue_pb2.Capabilities(left_out=left_out, left_out_count=count))


def said(path, reason):
    return diffusion_pb2.LeftOutModel(path=path, reason=reason)


def test_strangers_words_are_cut_and_escaped():
    found = taken(said("a\x1b[31m\u202eb.ckpt", "r" * 10_000), said("\n" * 10_000, "")).left_out
    assert found[0].path == "a\\x1b[31m\\u202eb.ckpt"
    assert all(len(text) <= workers.WORDS_LIMIT_CHARS for each in found for text in (each.path, each.reason))
    assert all(each.path.isprintable() and each.reason.isprintable() for each in found)


def test_more_than_the_limit_is_counted_and_not_kept():
    many = [said(f"{number}.ckpt", "a pickle") for number in range(workers.LEFT_OUT_LIMIT + 3)]
    found = taken(*many, count=2_000)
    assert (len(found.left_out), found.left_out_count) == (workers.LEFT_OUT_LIMIT, 2_000)


def test_a_count_that_is_less_than_the_list_is_not_believed():
    assert taken(said("a", "b"), said("c", "d"), count=1).left_out_count == 2


def test_a_models_note_is_cut_and_escaped():
    message = diffusion_pb2.Model(id="m", kind="controlnet", note="\x1b" * 500)
    [model] = workers.capabilities(queue_pb2.Capabilities(models=[message])).models
    assert model.note.startswith("\\x1b")
    assert len(model.note) <= workers.WORDS_LIMIT_CHARS


async def groups_of(*announced):
    clock = FakeClock()
    groups = CapabilityGroups(Records(MemoryStore(), clock), clock, OfferRules())
    for number, capabilities in enumerate(announced):
        group = await groups.keep(capabilities)
        groups.join(group, f"w{number}", f"n{number}", "diffusion")
    return groups


def with_left_out(*paths, **more):
    left_out = tuple(AnnouncedLeftOut(path=path, reason="a pickle") for path in paths)
    return Capabilities(left_out=left_out, left_out_count=len(paths), **more)


async def test_one_file_of_many_nodes_is_listed_once_with_some_of_them():
    groups = await groups_of(
        *(with_left_out("a.ckpt", models=(AnnouncedModel(id=f"m{n}", kind="lora"),)) for n in range(9))
    )
    [(left_out, nodes)] = groups.left_out().listed
    assert (left_out.path, len(nodes), len(set(nodes))) == ("a.ckpt", NODES_LIMIT, NODES_LIMIT)


async def test_the_list_of_a_fleet_is_bounded():
    announced = (with_left_out(*(f"{number}-{each}" for each in range(450))) for number in range(4))
    found = (await groups_of(*announced)).left_out()
    assert (len(found.listed), found.count) == (LEFT_OUT_LISTED, 1_800)


async def test_workers_that_are_gone_leave_nothing_in_the_list():
    groups = await groups_of(with_left_out("a.ckpt"))
    [group] = groups._known.values()
    groups.leave(group, "w0")
    assert groups.left_out().listed == ()


@pytest.mark.parametrize("kind", ["checkpoint", "lora", "controlnet", "vae", "embedding"])
def test_a_name_that_several_models_share_is_an_error_that_lists_them(kind):
    catalog = FleetCatalog()
    offered = Capabilities(models=tuple(AnnouncedModel(id=f"{each}.detail", kind=kind) for each in ("people", "style")))
    catalog.change(offered, before=None, after=(False, 1.0, "digest"))
    model = AnnouncedModel(id="dream", kind="checkpoint")
    find = {
        "checkpoint": lambda: needs.checkpoint_of(catalog, "Detail.safetensors", field="model"),
        "controlnet": lambda: needs.controlnet_of(catalog, "detail", None, model, field="controls[0].controlnet"),
    }.get(kind, lambda: needs.model_of(catalog, kind, "detail", model, field=kind))
    with pytest.raises(NotFound, match=r"several models: write people\.detail, style\.detail"):
        find()
