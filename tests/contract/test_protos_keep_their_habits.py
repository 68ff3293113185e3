"""Habits of the contract that a reader relies on."""

import importlib
import itertools
import pkgutil
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor

import fanlight

PROTOS = Path(__file__).parents[2] / "protos"
MODULES = [
    module.name for module in pkgutil.walk_packages(fanlight.__path__, "fanlight.") if module.name.endswith("_pb2")
]


def messages(descriptor):
    for message in descriptor.message_types_by_name.values():
        yield message
        yield from message.nested_types


@pytest.mark.parametrize("name", MODULES)
def test_every_enum_starts_with_unspecified(name):
    descriptor = importlib.import_module(name).DESCRIPTOR
    enums = list(descriptor.enum_types_by_name.values())
    enums += [enum for message in messages(descriptor) for enum in message.enum_types]

    assert all(enum.values[0].name.endswith("_UNSPECIFIED") for enum in enums)


@pytest.mark.parametrize("name", MODULES)
def test_times_end_in_time_and_tokens_are_bytes(name):
    for message in messages(importlib.import_module(name).DESCRIPTOR):
        for field in message.fields:
            if field.message_type is not None and field.message_type.name == "Timestamp":
                assert field.name.endswith("_time"), field.full_name
            if field.name.endswith("lease_token"):
                assert field.type == FieldDescriptor.TYPE_BYTES, field.full_name


@pytest.mark.parametrize("path", sorted(PROTOS.rglob("*.proto")), ids=lambda path: path.name)
def test_every_rpc_says_what_it_promises(path):
    lines = path.read_text().splitlines()
    silent = [line for above, line in itertools.pairwise(lines) if line.startswith("  rpc ") and "//" not in above]

    assert silent == []
