"""Named parameters; see fanlight.contract.parameter_values."""

from fanlight.contract.parameter_values import Parameter, Value, canonical, fill

__all__ = ["Parameter", "Value", "canonical", "fill"]
