"""Which fields a side was built with, and which of a message are newer. Fields are only ever added, never reused.

A field that is not known is refused or becomes a need; it is never dropped in silence.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from fanlight.errors import InvalidField
from fanlight.queue.v1.queue_pb2 import ContractRevision, KnownMessage

# Counts up when requests change in a way that field numbers do not show.
REVISION = 2
_OURS = "fanlight."


@dataclass(frozen=True, slots=True, kw_only=True)
class UnknownField:
    """A field that this side's messages do not have."""

    # Of the message that it is in, such as `controls[0]`; empty for the request itself.
    path: str
    # Full name, such as `fanlight.diffusion.v1.Control`.
    message_name: str
    number: int

    @property
    def field(self) -> str:
        """As errors name it: `31`, or `controls[0].9`."""
        return f"{self.path}.{self.number}" if self.path else str(self.number)

    @property
    def need(self) -> str:
        """What a worker must offer for it, such as `field:fanlight.diffusion.v1.Control:9`."""
        return field_need(self.message_name, self.number)


def field_need(message_name: str, number: int) -> str:
    """The need of a worker that knows this field of a message."""
    return f"field:{message_name}:{number}"


def contract_revision(*message_classes: type[Message]) -> ContractRevision:
    """What this side understands of these messages and all of Fanlight's below them, ordered by name."""
    known: dict[str, int] = {}
    waiting = [cast(Descriptor, each.DESCRIPTOR) for each in message_classes]
    while waiting:
        descriptor = waiting.pop()
        if descriptor.full_name in known:
            continue
        known[descriptor.full_name] = max((field.number for field in descriptor.fields), default=0)
        waiting += _ours_below(descriptor)
    messages = [KnownMessage(name=name, last_field=known[name]) for name in sorted(known)]
    return ContractRevision(revision=REVISION, messages=messages)


def _ours_below(descriptor: Descriptor) -> list[Descriptor]:
    nested = (field.message_type for field in descriptor.fields)
    return [each for each in nested if each is not None and each.full_name.startswith(_OURS)]


def unknown_fields(message: Message) -> list[UnknownField]:
    """Those of the message and of all messages below it, each once for its message."""
    return list(_unknown(message, ""))


def _unknown(message: Message, path: str) -> Iterator[UnknownField]:
    name = message.DESCRIPTOR.full_name
    unknown = UnknownFieldSet(message)
    for number in sorted({unknown[index].field_number for index in range(len(unknown))}):
        yield UnknownField(path=path, message_name=name, number=number)
    for field, value in message.ListFields():
        if field.message_type is None or not field.message_type.full_name.startswith(_OURS):
            continue
        below = f"{path}.{field.name}" if path else field.name
        if isinstance(value, Message):
            yield from _unknown(value, below)
        else:
            for index, each in enumerate(value):
                yield from _unknown(each, f"{below}[{index}]")


def refuse_unknown_fields(message: Message) -> None:
    """InvalidField about the first field that this side does not know."""
    for unknown in _unknown(message, ""):
        raise InvalidField(
            f"field {unknown.number} of {unknown.message_name} is newer than this service, which knows revision "
            f"{REVISION} of the contract: leave it out, or update the service",
            field=unknown.field,
        )
