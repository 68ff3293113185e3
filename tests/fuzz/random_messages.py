"""Random protobuf messages of any type, from its descriptor: what is valid on the wire and mostly wrong in meaning."""

import math
import random
from collections.abc import Sequence
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

ANY = "google.protobuf.Any"
REPEATED_MOST = 3
DEPTH_MOST = 5
SET_SHARES, NAMED_SHARE, SMALL_SHARE = (0.1, 0.3, 0.7), 0.6, 0.6
TEXTS = (
    "",
    "-1",
    "%00",
    "../../etc/passwd",
    "\u202e\u0000",
    "jobs/",
    "sha256:",
    "0" * 300,
    "a/b?c#d",
    "{}",
    "\U0001f98a",
)
INTEGERS = (0, 1, 2, 3, 10, 100, -1, 1 << 31, (1 << 31) - 1, -(1 << 31), 1 << 32, (1 << 63) - 1, -(1 << 63))
FLOATS = (0.0, 0.1, 0.5, 1.0, -1.0, 1e-30, 1e30, math.inf, -math.inf, math.nan)
BITS = {
    FieldDescriptor.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, (1 << 64) - 1),
}


class RandomMessages:
    def __init__(self, pool: DescriptorPool, seed: int, packed: Sequence[Descriptor] = ()) -> None:
        """`packed`: what goes into fields of type Any."""
        self._pool, self._packed = pool, packed
        self.random = random.Random(seed)
        self.names: Sequence[str] = ("",)
        # How many of a message's fields are set.
        self._share = 0.5

    def any_message(self, kind: Descriptor) -> Message:
        """Of few fields or of many: what sets all of them is mostly refused for one."""
        self._share = self.random.choice(SET_SHARES)
        return self.message(kind)

    def message(self, kind: Descriptor, depth: int = 0) -> Message:
        made: Any = GetMessageClass(kind)()
        if kind.full_name == ANY:
            if self._packed and depth < DEPTH_MOST:
                made.Pack(self.message(self.random.choice(self._packed), depth + 1))
            return made  # type: ignore[no-any-return]
        for field in kind.fields:
            if self.random.random() < self._share and not (field.message_type and depth >= DEPTH_MOST):
                self._set(made, field, depth)
        return made  # type: ignore[no-any-return]

    def _set(self, made: Any, field: FieldDescriptor, depth: int) -> None:
        count = self.random.randint(0, REPEATED_MOST)
        values = getattr(made, field.name)
        if field.message_type and field.message_type.GetOptions().map_entry:
            entry = field.message_type.fields_by_name
            for _ in range(count):
                key = self._scalar(entry["key"])
                if entry["value"].message_type:
                    values[key].CopyFrom(self.message(entry["value"].message_type, depth + 1))
                else:
                    values[key] = self._scalar(entry["value"])
        elif field.message_type and field.is_repeated:
            values.extend(self.message(field.message_type, depth + 1) for _ in range(count))
        elif field.message_type:
            values.CopyFrom(self.message(field.message_type, depth + 1))
        elif field.is_repeated:
            values.extend(self._scalar(field) for _ in range(count))
        else:
            setattr(made, field.name, self._scalar(field))

    def _scalar(self, field: FieldDescriptor) -> Any:
        kind = field.cpp_type
        if kind in BITS:
            low, high = BITS[kind]
            found = self.random.choice(INTEGERS[:3] if self.random.random() < SMALL_SHARE else INTEGERS)
            return min(high, max(low, found))
        if kind == FieldDescriptor.CPPTYPE_BOOL:
            return self.random.random() < 0.5
        if kind == FieldDescriptor.CPPTYPE_ENUM:
            assert field.enum_type is not None
            return self.random.choice([*(each.number for each in field.enum_type.values), 99])
        if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
            return self.random.choice(FLOATS)
        text = self.text()
        return text.encode() + self.random.randbytes(4) if field.type == FieldDescriptor.TYPE_BYTES else text

    def text(self) -> str:
        if self.random.random() < NAMED_SHARE:
            return self.random.choice(self.names)
        return self.random.choice((*TEXTS, f"{self.random.getrandbits(64):x}"))
