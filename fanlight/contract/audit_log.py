"""Entries of the audit log: what is hashed, how it reads as a CloudEvent, and whether chains are whole.

Gateways write entries, clients check them. Knows no store and no transport.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from itertools import pairwise

TYPE_PREFIX = "io.fanlight.audit."
SUCCESS = "success"
# Of the texts of an entry, each.
TEXT_LIMIT_BYTES = 512
# How many other chains the first entry of a chain names.
LINKS_LIMIT = 16


class EntryKind(StrEnum):
    CHANGE = "change"
    INTENT = "intent"
    COMPLETION = "completion"
    READ = "read"


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """Who did it; all empty for the gateway itself."""

    tenant: str = ""
    role: str = ""
    key_id: str = ""
    address: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainHead:
    chain: str
    number: int
    hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditChain:
    """What the store knows of a chain besides its entries."""

    # It reached at least this far.
    head: ChainHead
    # The oldest kept entry, and the hash of the one before.
    first_number: int = 1
    first_previous_hash: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One entry; the fields as in fanlight.audit_log.v1.AuditEntry."""

    chain: str
    number: int
    # Whole microseconds since the epoch: no float goes into a hash.
    time_us: int
    kind: EntryKind
    actor: Actor = field(default_factory=Actor)
    action: str
    target: str
    target_tenant: str = ""
    result: str = ""
    detail: str = ""
    intent: int = 0
    links: tuple[ChainHead, ...] = ()
    previous_hash: str = ""
    hash: str = ""

    @property
    def head(self) -> ChainHead:
        return ChainHead(chain=self.chain, number=self.number, hash=self.hash)


def hash_of(entry: AuditEntry) -> str:
    """The sha256, in hexadecimal, of the entry's fields but `hash`: as JSON in ASCII, keys sorted, without spaces."""
    fields = {name: value for name, value in asdict(entry).items() if name != "hash"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hashed(entry: AuditEntry) -> AuditEntry:
    return replace(entry, hash=hash_of(entry))


def event_of(entry: AuditEntry) -> Mapping[str, object]:
    """As a CloudEvent 1.0 in JSON's structured mode; `data` has the entry's own fields, as they are hashed."""
    return {
        "specversion": "1.0",
        "id": f"{entry.chain}/{entry.number}",
        "source": f"/fanlight/audit-log/{entry.chain}",
        "type": TYPE_PREFIX + entry.action,
        "subject": entry.target,
        "time": datetime.fromtimestamp(entry.time_us / 1_000_000, UTC).isoformat(timespec="microseconds"),
        "datacontenttype": "application/json",
        "sequence": f"{entry.number:012d}",
        "data": asdict(entry),
    }


def entry_of(event: Mapping[str, object]) -> AuditEntry:
    """The entry of an event. ValueError for anything else."""
    data = event.get("data")
    if not isinstance(data, Mapping):
        raise ValueError("is no event of an audit log: it has no data")
    try:
        fields = dict(data)
        fields["kind"] = EntryKind(fields["kind"])
        fields["actor"] = Actor(**fields["actor"])
        fields["links"] = tuple(ChainHead(**each) for each in fields["links"])
        return AuditEntry(**fields)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"is no event of an audit log: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    entries: int
    # How far each chain reaches; to be kept elsewhere and compared later.
    heads: Sequence[ChainHead]
    # Intents without a completion: the gateway was stopped in the middle, or still works on it.
    open_intents: Sequence[AuditEntry]
    # Sentences; empty for a whole log.
    faults: Sequence[str]


def verify(
    entries: Iterable[AuditEntry], chains: Sequence[AuditChain] | None = None, known: Sequence[ChainHead] = ()
) -> Verification:
    """Whether entries, in any order, were changed, removed, added or put in another order.

    `chains`: what the gateway says of them; None where that is not known, as of a file, whose chains may then begin
    and end anywhere. `known`: heads of an earlier verification, which must still be there unless they were deleted by
    age.
    """
    by_chain: dict[str, list[AuditEntry]] = defaultdict(list)
    for entry in entries:
        by_chain[entry.chain].append(entry)
    said = {each.head.chain: each for each in chains or ()}
    faults: list[str] = []
    for chain, found in sorted(by_chain.items()):
        found.sort(key=lambda entry: entry.number)
        faults += _faults_within(chain, found)
        if chains is not None:
            faults += _faults_at_ends(chain, found, said.get(chain))
    faults += [
        f"{chain}: all {each.head.number - each.first_number + 1} entries are missing"
        for chain, each in said.items()
        if chain not in by_chain and each.first_number <= each.head.number
    ]
    links = [link for found in by_chain.values() for link in found[0].links]
    faults += _faults_of_heads(by_chain, links, "the first entry of another chain")
    faults += _faults_of_heads(by_chain, known, "an earlier verification")
    if chains is not None:
        faults += [f"{each.chain}: is gone, and an earlier verification saw it" for each in known if _lost(each, said)]
    return Verification(
        entries=sum(map(len, by_chain.values())),
        heads=[found[-1].head for _, found in sorted(by_chain.items())],
        open_intents=[entry for found in by_chain.values() for entry in _open_intents(found)],
        faults=faults,
    )


def _lost(head: ChainHead, said: Mapping[str, AuditChain]) -> bool:
    return head.chain not in said


def _faults_within(chain: str, found: Sequence[AuditEntry]) -> list[str]:
    faults = [f"{chain}/{entry.number}: was changed" for entry in found if entry.hash != hash_of(entry)]
    for before, entry in pairwise(found):
        if entry.number == before.number:
            faults.append(f"{chain}/{entry.number}: is there twice")
        elif entry.number > before.number + 1:
            faults.append(f"{chain}/{before.number + 1}: is missing, up to {chain}/{entry.number - 1}")
        elif entry.previous_hash != before.hash:
            faults.append(f"{chain}/{entry.number}: does not follow {chain}/{before.number}")
        if entry.time_us < before.time_us:
            faults.append(f"{chain}/{entry.number}: is older than {chain}/{before.number}")
    return faults


def _faults_at_ends(chain: str, found: Sequence[AuditEntry], said: AuditChain | None) -> list[str]:
    # Older entries are those that are just being deleted by age.
    first = next((entry for entry in found if entry.number >= (said.first_number if said else 1)), None)
    faults = []
    if said is None:
        # The head is written right after an entry, and so may miss for the only one of a chain.
        if len(found) > 1 or found[0].number != 1:
            faults.append(f"{chain}: the gateway does not know this chain")
        return faults
    if first is None or first.number != said.first_number:
        faults.append(f"{chain}/{said.first_number}: is missing at the beginning")
    elif first.previous_hash != said.first_previous_hash:
        faults.append(f"{chain}/{first.number}: does not follow what was before it")
    if found[-1].number < said.head.number:
        faults.append(f"{chain}/{found[-1].number + 1}: is missing, up to {chain}/{said.head.number}")
    return faults + _faults_of_heads({chain: found}, [said.head], "the chain's head")


def _faults_of_heads(by_chain: Mapping[str, Sequence[AuditEntry]], heads: Iterable[ChainHead], who: str) -> list[str]:
    """Heads that name another entry than the one that is there."""
    faults = []
    for head in heads:
        entry = next((each for each in by_chain.get(head.chain, ()) if each.number == head.number), None)
        if entry is not None and entry.hash != head.hash:
            faults.append(f"{head.chain}/{head.number}: is another entry than the one that {who} names")
    return faults


def _open_intents(found: Sequence[AuditEntry]) -> list[AuditEntry]:
    done = {entry.intent for entry in found if entry.kind is EntryKind.COMPLETION}
    return [entry for entry in found if entry.kind is EntryKind.INTENT and entry.number not in done]
