"""Other services' names for the annotators; see fanlight.contract.annotator_aliases."""

from fanlight.contract.annotator_aliases import ALIASES

__all__ = ["ALIASES"]
