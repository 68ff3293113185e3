"""Named parameters on the wire; see fanlight.contract.parameters."""

from fanlight.contract.parameters import described, description, plain

__all__ = ["described", "description", "plain"]
