"""The contract's answer to every request of the corpus."""

import pytest

from fanlight.contract import annotation, generation
from fanlight.diffusion.v1.diffusion_pb2 import GenerateRequest
from fanlight.errors import FanlightError
from tests.fakes.corpus import CORPUS, Case

GOOD = [case for case in CORPUS if case.expected is None]
BAD = [case for case in CORPUS if case.expected is not None]


def check(case: Case) -> None:
    request = case.build()
    if isinstance(request, GenerateRequest):
        generation.check(request)
    else:
        annotation.check(request)


@pytest.mark.parametrize("case", GOOD, ids=[case.name for case in GOOD])
def test_what_some_worker_can_do_is_accepted(case):
    check(case)


@pytest.mark.parametrize("case", BAD, ids=[case.name for case in BAD])
def test_what_no_worker_can_do_is_refused_by_field(case):
    with pytest.raises(FanlightError) as caught:
        check(case)

    code, field, part = case.expected
    assert (caught.value.code, caught.value.field) == (code, field)
    assert part in caught.value.message


@pytest.mark.parametrize(
    ("name", "field"), [("32 images", "count"), ("a photo and its annotator", "controls[0].annotator")]
)
def test_what_only_the_gateway_takes_is_refused_by_a_worker(name, field):
    case = next(case for case in CORPUS if case.name == name)
    assert case.is_for_gateway
    with pytest.raises(FanlightError) as caught:
        generation.check_one_image(case.build())

    assert (caught.value.code, caught.value.field) == ("INVALID_ARGUMENT", field)


def test_names_are_unique():
    assert len({case.name for case in CORPUS}) == len(CORPUS) >= 80
