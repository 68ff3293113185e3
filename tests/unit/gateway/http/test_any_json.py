"""Whatever JSON comes, it is a job or one of our errors."""

import contextlib
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fanlight.common.v1 import common_pb2
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import InvalidField, NotFound, TooLarge
from fanlight.gateway.v1 import gateway_pb2
from fanlight.preprocessor.v1 import preprocessor_pb2
from services.gateway.http.bodies import parse_json
from services.gateway.http.json_messages import fill, to_json
from services.gateway.wire import requests
from tests.fakes.gateway import FakeWorkers

MESSAGES = (
    gateway_pb2.CreateJobRequest,
    diffusion_pb2.GenerateRequest,
    diffusion_pb2.Control,
    preprocessor_pb2.AnnotateRequest,
    common_pb2.ImageSource,
)
WORDS = [field.name for message in MESSAGES for field in message.DESCRIPTOR.fields] + ["canny", "starter", "digest"]

texts = st.sampled_from([*WORDS, "", "data:image/png;base64,iVBORw0KGgo=", "part:x", "\ud800", "\0"]) | st.text(
    max_size=5
)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | texts
anything = st.recursive(
    leaves, lambda some: st.lists(some, max_size=3) | st.dictionaries(texts, some, max_size=5), max_leaves=25
)
pictures = st.fixed_dictionaries({}, optional={"url": texts | leaves, "data": texts, "blob": anything})
controls = st.fixed_dictionaries(
    {"image": pictures | anything},
    optional={"annotator": texts, "parameters": anything, "scale": leaves, "start": leaves, "end": leaves},
)
generations = st.fixed_dictionaries(
    {"prompt": texts},
    optional=dict.fromkeys(("steps", "guidance_scale", "seed", "count", "width_px", "height_px", "scheduler"), leaves)
    | {"controls": st.lists(controls, max_size=2) | anything},
)
annotations = st.fixed_dictionaries(
    {"image": pictures | anything}, optional={"annotator": texts, "parameters": anything}
)
packed = st.fixed_dictionaries(
    {"@type": texts | st.sampled_from([f"type.googleapis.com/{each.DESCRIPTOR.full_name}" for each in MESSAGES])},
    optional={"prompt": texts, "image": pictures, "annotator": texts, "value": anything},
)
jobs = st.fixed_dictionaries(
    {}, optional={"generation": generations | anything, "annotation": annotations | anything}
) | (st.fixed_dictionaries({"request": packed | anything}))
FLEET = FakeWorkers()


@given(jobs | anything)
@settings(max_examples=150, deadline=None)
def test_any_value_is_a_job_or_an_error_of_ours(value: Any) -> None:
    message = gateway_pb2.CreateJobRequest()
    try:
        fill(message, value)
        requests.new_job(message, FLEET)
    except (InvalidField, NotFound, TooLarge):
        return
    again = gateway_pb2.CreateJobRequest()
    fill(again, to_json(message))
    assert again == message


@given(st.binary(max_size=50) | st.builds(lambda value: json.dumps(value).encode(), anything))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_json_or_an_error_of_ours(data: bytes) -> None:
    with contextlib.suppress(InvalidField):
        json.dumps(parse_json(data, field="body"), allow_nan=False)
