"""Numbers in messages; see fanlight.contract.fields."""

from fanlight.contract.fields import format_number as told

__all__ = ["told"]
