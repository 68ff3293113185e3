"""An annotator's parameters: given by clients, sent to workers."""

import json
from collections.abc import Mapping

from google.protobuf import struct_pb2

from services.gateway.jobs.workers import Annotator
from services.kernel.parameters import Value, canonical, fill
from services.kernel.wire_parameters import plain


def given(values: struct_pb2.Struct, annotator: Annotator, *, field: str) -> str:
    """Canonical JSON of all the annotator's parameters. InvalidField."""
    return canonical(fill(annotator.parameters, plain(values), field=field))


def struct_of(canonical_json: str) -> struct_pb2.Struct:
    values: Mapping[str, Value] = json.loads(canonical_json)
    struct = struct_pb2.Struct()
    struct.update(values)
    return struct
