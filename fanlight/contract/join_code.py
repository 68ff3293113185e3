"""The join code, by which a node joins a fleet: what the operator copies from the gateway to the node.

`flj1.{invitation}.{secret}.{authority}@{gateway}`. The authority is `o` and a digest for a certificate that the gateway
made itself, `c` and a digest for one that the operator gave, `-` in plain text. `@{gateway}` is left out where no
address is set.
"""

import re
from dataclasses import dataclass, field

from fanlight.errors import InvalidField

PREFIX = "flj1"
LIMIT_CHARS = 1_024
# The name in every certificate that a gateway made itself. Nodes trust only that gateway's authority for it.
OWN_NAME = "gateway.fanlight.internal"

_CODE = re.compile(rf"{PREFIX}\.([0-9a-f]{{10}})\.([0-9a-f]{{64}})\.(?:([oc])([0-9a-f]{{64}})|-)(?:@(\S{{3,512}}))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinCode:
    invite: str
    secret: str = field(repr=False)
    # Hexadecimal sha256 of the DER of the last certificate of the gateway's chain; empty for a gateway in plain text.
    authority: str = ""
    # The gateway made its certificate itself: it has the name OWN_NAME, whatever address is dialed.
    is_own: bool = False
    # HOST:PORT of the gateway's gRPC, or several separated by commas; empty where the node is told it otherwise.
    gateway: str = ""

    def __str__(self) -> str:
        authority = ("o" if self.is_own else "c") + self.authority if self.authority else "-"
        code = f"{PREFIX}.{self.invite}.{self.secret}.{authority}"
        return f"{code}@{self.gateway}" if self.gateway else code


def parse_join_code(text: str, *, field: str = "join_code") -> JoinCode:
    """InvalidField for anything else, without quoting the secret."""
    found = _CODE.fullmatch(text.strip()) if len(text) <= LIMIT_CHARS else None
    if found is None:
        raise InvalidField(
            f"is not a join code, which starts with {PREFIX}.; copy all of what `fanlight nodes invite` printed",
            field=field,
        )
    invite, secret, kind, authority, gateway = found.groups()
    return JoinCode(invite=invite, secret=secret, authority=authority or "", is_own=kind == "o", gateway=gateway or "")
