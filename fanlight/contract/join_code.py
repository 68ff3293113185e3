"""The join code, by which a node joins a fleet: what the operator copies from the gateway to the node.

`flj1.{invitation}.{secret}.{authority}@{gateway}`. The digest of the gateway's certificate authority is `-` for a
gateway in plain text; `@{gateway}` is left out where no address is set.
"""

import re
from dataclasses import dataclass, field

from fanlight.errors import InvalidField

PREFIX = "flj1"
PLAIN_TEXT = "-"
LIMIT_CHARS = 1_024

_CODE = re.compile(rf"{PREFIX}\.([0-9a-f]{{10}})\.([0-9a-f]{{64}})\.([0-9a-f]{{64}}|{PLAIN_TEXT})(?:@(\S{{3,512}}))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinCode:
    invite: str
    secret: str = field(repr=False)
    # Hexadecimal sha256 of the DER of the gateway's certificate authority; empty for a gateway in plain text.
    authority: str = ""
    # HOST:PORT of the gateway's gRPC, or several separated by commas; empty where the node must be told apart.
    gateway: str = ""

    def __str__(self) -> str:
        code = f"{PREFIX}.{self.invite}.{self.secret}.{self.authority or PLAIN_TEXT}"
        return f"{code}@{self.gateway}" if self.gateway else code


def parse_join_code(text: str, *, field: str = "join_code") -> JoinCode:
    """InvalidField for anything else, without quoting the secret."""
    found = _CODE.fullmatch(text.strip()) if len(text) <= LIMIT_CHARS else None
    if found is None:
        raise InvalidField(
            f"is not a join code, which starts with {PREFIX}.; copy all of what `fanlight nodes invite` printed",
            field=field,
        )
    invite, secret, authority, gateway = found.groups()
    return JoinCode(
        invite=invite, secret=secret, authority="" if authority == PLAIN_TEXT else authority, gateway=gateway or ""
    )
