"""An audit log over any records, for parts that are tested without a gateway."""

import os

from services.gateway.app.audit_log import AuditLog
from services.gateway.app.records import Records
from services.gateway.ports import Clock


def audit_log(store: Records, clock: Clock) -> AuditLog:
    return AuditLog(store, clock, os.urandom, retention_s=86_400.0, retention_count=1_000)
