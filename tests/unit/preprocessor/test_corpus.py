"""For every annotation of the corpus, a direct call to a worker gives the same error as client and gateway."""

import pytest

from fanlight.errors import FanlightError
from fanlight.preprocessor.v1.preprocessor_pb2 import AnnotateRequest
from services.kernel.images import ImageLimits
from services.preprocessor.registry import Registry, core
from services.preprocessor.wire import parse_request
from tests.fakes.corpus import CORPUS

CASES = [case for case in CORPUS if isinstance(case.build(), AnnotateRequest)]
REGISTRY = Registry([*core()])
LIMITS = ImageLimits(size_bytes=500_000, pixels=70_000_000, side_px=8_192)


def answer(request: AnnotateRequest) -> tuple[str, str, str] | None:
    try:
        parse_request(request, REGISTRY, LIMITS)
    except FanlightError as error:
        return error.code, error.field, error.message
    return None


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_an_annotation_is_answered_with_the_contracts_words(case):
    found = answer(case.build())
    assert (found and found[:2]) == (case.expected and case.expected[:2])
    assert found is None or case.expected[2] in found[2]
