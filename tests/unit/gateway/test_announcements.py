"""What workers say about themselves is taken in, bounded, or refused by the field's name."""

import math

import pytest

from fanlight.contract.needs import ALWAYS_KNOWN, young_fields
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import FanlightError, InvalidField
from fanlight.preprocessor.v1 import preprocessor_pb2
from fanlight.queue.v1 import queue_pb2
from services.gateway.domain.workers import AnnouncedModel, ReportedStepTime
from services.gateway.wire import workers

GENERATE = "fanlight.diffusion.v1.GenerateRequest"
LAST = max(field.number for field in diffusion_pb2.GenerateRequest.DESCRIPTOR.fields)


def announced(**fields: object) -> queue_pb2.Capabilities:
    return queue_pb2.Capabilities(**fields)


def knowing(last_field: int, *, name: str = GENERATE, revision: int = 3) -> queue_pb2.Capabilities:
    message = queue_pb2.KnownMessage(name=name, last_field=last_field)
    return announced(contract=queue_pb2.ContractRevision(revision=revision, messages=[message]))


def a_worker(**fields: object) -> queue_pb2.Worker:
    return queue_pb2.Worker(**{"id": "w", "node": "n", "stage": "diffusion", **fields})


def test_offers_limits_and_layers_are_what_tasks_are_matched_by() -> None:
    message = announced(
        models=[diffusion_pb2.Model(id="small", kind="checkpoint", text_encoder_layers=12)],
        offers=["scheduler:euler_a", "precision:float16"],
        limits=[queue_pb2.Limit(name="pixels", maximum=4096), queue_pb2.Limit(name="images", maximum=2**64 - 1)],
    )
    taken = workers.capabilities(message)
    assert taken.models == (AnnouncedModel(id="small", kind="checkpoint", text_encoder_layers=12),)
    assert taken.offers == {"checkpoint:small", "scheduler:euler_a", "precision:float16"}
    assert taken.all_limits == (("images", 2**64 - 1), ("pixels", 4096), ("text_encoder_layers:small", 12))


def test_the_order_of_offers_and_limits_makes_no_other_capabilities() -> None:
    limits = [queue_pb2.Limit(name="a", maximum=1), queue_pb2.Limit(name="b", maximum=2)]
    one = workers.capabilities(announced(offers=["x", "y"], limits=limits))
    assert one == workers.capabilities(announced(offers=["y", "x"], limits=limits[::-1]))


def test_what_is_loaded_is_no_part_of_capabilities() -> None:
    def taken(**loaded: object):
        model = diffusion_pb2.Model(id="m", kind="checkpoint", residency=loaded.get("residency", 0))
        annotator = preprocessor_pb2.Annotator(id="a", loaded=loaded.get("loaded", False))
        return workers.capabilities(announced(models=[model], annotators=[annotator]))

    assert taken() == taken(residency=diffusion_pb2.Model.RESIDENCY_VRAM, loaded=True)


def test_fields_that_are_newer_than_the_gateway_are_offered_by_number() -> None:
    young = frozenset(young_fields(GENERATE))
    assert workers.capabilities(knowing(LAST)).offers == young
    assert workers.capabilities(knowing(LAST + 2)).offers - young == {
        f"field:{GENERATE}:{LAST + 1}",
        f"field:{GENERATE}:{LAST + 2}",
    }
    assert len(workers.capabilities(knowing(2**29 - 1)).offers - young) == workers.NEW_FIELDS_LIMIT
    assert workers.capabilities(knowing(7, name="fanlight.future.v1.Unknown")).offers == frozenset()
    assert workers.capabilities(announced()).offers == frozenset()


def with_defaults(**fields):
    defaults = diffusion_pb2.GenerationDefaults(**fields)
    return announced(models=[diffusion_pb2.Model(id="m", kind="k", defaults=defaults)])


def test_a_worker_offers_the_young_fields_that_its_contract_has() -> None:
    assert workers.capabilities(knowing(ALWAYS_KNOWN[GENERATE])).offers == frozenset()
    assert workers.capabilities(knowing(40)).offers >= {f"field:{GENERATE}:40"}
    assert f"field:{GENERATE}:41" not in workers.capabilities(knowing(40)).offers


def sized(width_px: int, height_px: int, step_px: int = 0) -> queue_pb2.Capabilities:
    model = diffusion_pb2.Model(id="m", kind="checkpoint", width_px=width_px, height_px=height_px, size_step_px=step_px)
    return announced(models=[model])


@pytest.mark.parametrize("size", [(0, 0, 0), (0, 0, 512), (64, 8_192, 64), (65, 67, 0), (512, 1_024, 512)])
def test_a_models_native_size_is_taken_within_its_limits(size: tuple[int, int, int]) -> None:
    (model,) = workers.capabilities(sized(*size)).models
    assert (model.width_px, model.height_px, model.size_step_px) == size


def test_the_id_of_any_model_is_taken() -> None:
    (model,) = workers.capabilities(announced(models=[diffusion_pb2.Model(id="*", kind="lora")])).models
    assert model.id == "*"


@pytest.mark.parametrize("name", ["hf:model", "org/model", "a<b", "a>b"])
def test_an_id_that_reads_as_a_reference_or_a_tag_is_refused(name: str) -> None:
    for message, field in (
        (announced(models=[diffusion_pb2.Model(id=name, kind="lora")]), "capabilities.models[0].id"),
        (announced(annotators=[preprocessor_pb2.Annotator(id=name)]), "capabilities.annotators[0].id"),
    ):
        with pytest.raises(InvalidField, match="references and LoRA tags") as caught:
            workers.capabilities(message)
        assert caught.value.field == field


LONG = "n" * 300


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (announced(limits=[queue_pb2.Limit(name=LONG)]), "capabilities.limits[0].name"),
        (announced(limits=[queue_pb2.Limit(name="")]), "capabilities.limits[0].name"),
        (announced(limits=[queue_pb2.Limit(name=str(i)) for i in range(300)]), "capabilities.limits"),
        (
            announced(limits=[queue_pb2.Limit(name="pixels", maximum=i) for i in range(2)]),
            "capabilities.limits[1].name",
        ),
        (announced(offers=[f"o:{i}" for i in range(10_001)]), "capabilities"),
        (announced(offers=["scheduler:ddim", LONG]), "capabilities.offers[1]"),
        (announced(offers=["a", "b", "a"]), "capabilities.offers[2]"),
        (announced(models=[diffusion_pb2.Model(id="m", kind="lora")] * 2), "capabilities.models[1].id"),
        (announced(annotators=[preprocessor_pb2.Annotator(id="a")] * 2), "capabilities.annotators[1].id"),
        (announced(models=[diffusion_pb2.Model(id="m", kind="k", size_bytes=-1)]), "capabilities.models[0].size_bytes"),
        (
            announced(models=[diffusion_pb2.Model(id="m", kind="k", aliases=["a"] * 300)]),
            "capabilities.models[0].aliases",
        ),
        (
            announced(models=[diffusion_pb2.Model(id="m", kind="k", text_encoder_layers=2**31)]),
            "capabilities.models[0].text_encoder_layers",
        ),
        (
            announced(annotators=[preprocessor_pb2.Annotator(id="a", weight_bytes=-5)]),
            "capabilities.annotators[0].weight_bytes",
        ),
        (with_defaults(steps=151), "capabilities.models[0].defaults.steps"),
        (with_defaults(guidance_scale=math.nan), "capabilities.models[0].defaults.guidance_scale"),
        (with_defaults(guidance_scale=31.0), "capabilities.models[0].defaults.guidance_scale"),
        (with_defaults(width_px=65, height_px=64), "capabilities.models[0].defaults.width_px"),
        (with_defaults(sources=["x"] * 9), "capabilities.models[0].defaults.sources"),
        (sized(2**32 - 1, 2**32 - 1), "capabilities.models[0].width_px"),
        (sized(63, 64), "capabilities.models[0].width_px"),
        (sized(64, 8_193), "capabilities.models[0].height_px"),
        (sized(64, 0), "capabilities.models[0].height_px"),
        (sized(0, 64), "capabilities.models[0].width_px"),
        (sized(64, 65, 64), "capabilities.models[0].height_px"),
        (sized(64, 64, 513), "capabilities.models[0].size_step_px"),
        (knowing(2**31), "capabilities.contract.messages[0].last_field"),
        (knowing(1, revision=2**31), "capabilities.contract.revision"),
        (knowing(1, name="Picture"), "capabilities.contract.messages[0].name"),
        (knowing(1, name="no message.at all"), "capabilities.contract.messages[0].name"),
        (
            announced(contract=queue_pb2.ContractRevision(messages=[queue_pb2.KnownMessage(name=GENERATE)] * 2)),
            "capabilities.contract.messages[1].name",
        ),
        (
            announced(contract=queue_pb2.ContractRevision(messages=[queue_pb2.KnownMessage(name=GENERATE)] * 300)),
            "capabilities.contract.messages",
        ),
    ],
)
def test_nonsense_is_refused_by_its_field(message: queue_pb2.Capabilities, field: str) -> None:
    with pytest.raises(FanlightError) as caught:
        workers.capabilities(message)
    assert caught.value.field == field


def test_a_worker_holds_so_many_models_at_most() -> None:
    with pytest.raises(FanlightError) as caught:
        workers.polling_worker(a_worker(disk_models=[str(i) for i in range(20_001)]), draining=False)
    assert caught.value.field == "worker.disk_models"


def times_of(*times: queue_pb2.StepTime) -> tuple[ReportedStepTime, ...]:
    return workers.polling_worker(a_worker(step_times=times), draining=False).step_times


def a_time(mean_s: float = 0.5, *, family: str = "sd1", size_class: int = 18, deviation_s: float = 0.0):
    return queue_pb2.StepTime(family=family, size_class=size_class, mean_s=mean_s, deviation_s=deviation_s)


@pytest.mark.parametrize(
    "time",
    [
        *(a_time(each) for each in (math.nan, math.inf, -math.inf, -1.0, 0.0)),
        a_time(size_class=0),
        a_time(size_class=2**31),
        a_time(family=LONG),
    ],
)
def test_a_time_that_nobody_can_have_measured_is_left_out(time: queue_pb2.StepTime) -> None:
    assert times_of(time, a_time(0.25)) == (ReportedStepTime(family="sd1", size_class=18, mean_s=0.25),)


def test_a_time_keeps_its_deviation_there_and_back() -> None:
    sent = a_worker(step_times=[a_time(0.5, deviation_s=0.125), a_time(2.0, size_class=20, deviation_s=math.nan)])
    worker = workers.polling_worker(sent, draining=False)
    assert [each.deviation_s for each in worker.step_times] == [0.125, 0.0]
    assert [each.deviation_s for each in workers.worker(worker).step_times] == [0.125, 0.0]
    assert workers.polling_worker(workers.worker(worker), draining=False) == worker


def test_of_ten_thousand_classes_some_are_taken_and_of_two_for_the_same_the_first() -> None:
    many = [a_time(family=f"f{i}") for i in range(10_000)]
    assert len(times_of(*many)) == workers.STEP_TIMES_LIMIT
    assert times_of(a_time(1.0), a_time(2.0)) == (ReportedStepTime(family="sd1", size_class=18, mean_s=1.0),)
