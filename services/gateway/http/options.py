"""The named limits of the HTTP side."""

from dataclasses import dataclass, field

from services.gateway.app.callers import Callers

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpOptions:
    # Whose bearer tokens are taken.
    callers: Callers = field(default_factory=Callers)
    # The largest JSON body, or `job` part of a form.
    json_limit_bytes: int = 64 * MIB
    # The largest blob, raw or as a file of a form.
    blob_limit_bytes: int = 64 * MIB
    # The largest form, all its files together.
    form_limit_bytes: int = 256 * MIB
    # A body that stops coming for so long is given up.
    body_idle_s: float = 60.0
    # How long the rest of a refused body may stop coming before the connection is closed.
    linger_idle_s: float = 2.0
    # How often a silent event stream shows that it lives; home routers forget idle connections.
    heartbeat_s: float = 15.0
    # How many requests are answered at a time.
    requests_limit: int = 1_000
