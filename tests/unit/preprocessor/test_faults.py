"""A failed annotation names its annotator; damaged weights and the request's own faults are told apart."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from fanlight.errors import FanlightError, InvalidField, NodeFault, ResourceExhausted, Unavailable
from services.preprocessor.cache import AnnotatorCache, AnnotatorCacheLimits
from services.preprocessor.config import AnnotatorDevice
from services.preprocessor.faults import UnusableWeights, blames
from services.preprocessor.weights import AnnotatorWeights
from tests.unit.preprocessor.test_cache import HED, Somewhere


@pytest.mark.parametrize(
    ("raised", "expected", "part"),
    [
        (RuntimeError("shapes"), NodeFault, "annotator:hed"),
        (StopIteration(), NodeFault, "annotator:hed"),
        (RuntimeError("CUDA out of memory"), ResourceExhausted, "annotator:hed"),
        (Unavailable("hub").of_part("source:hub.test"), Unavailable, "source:hub.test"),
        (UnusableWeights("damaged"), UnusableWeights, "annotator:hed"),
        (InvalidField("is no image", field="image"), InvalidField, ""),
    ],
)
def test_a_failure_names_the_annotator_unless_something_else_is_to_blame(raised, expected, part):
    with pytest.raises(FanlightError) as caught, blames("hed", "cpu"):
        raise raised
    assert (type(caught.value), caught.value.part) == (expected, part)


@pytest.mark.parametrize(
    "error", [pickle.UnpicklingError("x"), KeyError("x"), EOFError(), RecursionError(), ValueError()]
)
async def test_weights_that_cannot_be_read_are_a_typed_error(error):
    def build(folder, device):
        raise error

    weights = AnnotatorWeights(name="hed", entry=HED, build=build)
    with ThreadPoolExecutor(1) as executor:
        cache = AnnotatorCache(Somewhere(), AnnotatorDevice(), executor, limits=AnnotatorCacheLimits())
        with pytest.raises(UnusableWeights, match="weights of hed"):
            async with cache.use(weights):
                pass
