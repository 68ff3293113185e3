"""Named parameters; see fanlight.contract.parameters."""

from fanlight.contract.parameters import Parameter, Value, canonical, fill

__all__ = ["Parameter", "Value", "canonical", "fill"]
