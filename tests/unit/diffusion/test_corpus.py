"""A worker that is asked directly answers every request of the corpus as client and gateway do."""

import pytest

from fanlight.diffusion.v1.diffusion_pb2 import GenerateRequest
from fanlight.errors import FanlightError, InvalidField
from tests.fakes.corpus import CORPUS

CASES = [case for case in CORPUS if isinstance(case.build(), GenerateRequest)]
REFUSED = [case for case in CASES if case.expected is not None]
ONE_IMAGE = [case for case in CASES if case.expected is None and not case.is_for_gateway]
FOR_GATEWAY = [case for case in CASES if case.expected is None and case.is_for_gateway]


@pytest.mark.parametrize("case", REFUSED, ids=[case.name for case in REFUSED])
def test_what_no_worker_can_do_is_refused_in_the_same_words(case, parser):
    with pytest.raises(FanlightError) as caught:
        parser.parse(case.build())
    code, field, part = case.expected
    assert (caught.value.code, caught.value.field) == (code, field)
    assert part in caught.value.message


def answer(case, parser) -> FanlightError | None:
    try:
        parser.parse(case.build())
    except FanlightError as error:
        return error
    return None


@pytest.mark.parametrize("case", ONE_IMAGE, ids=[case.name for case in ONE_IMAGE])
def test_what_some_worker_can_do_is_taken_or_lacking_here(case, parser):
    error = answer(case, parser)
    assert error is None or case.depends_on_worker, error
    # What a model's sides are multiples of is the same on every worker.
    assert error is None or error.is_request_fault == (case.name == "65 x 64"), error


@pytest.mark.parametrize("case", FOR_GATEWAY, ids=[case.name for case in FOR_GATEWAY])
def test_what_only_the_gateway_takes_is_refused(case, parser):
    with pytest.raises(InvalidField):
        parser.parse(case.build())
