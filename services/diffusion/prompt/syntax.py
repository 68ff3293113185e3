"""A1111's prompt syntax; see fanlight.contract.prompt."""

from fanlight.contract.limits import LORA_WEIGHT_LIMIT, LORAS_LIMIT
from fanlight.contract.prompt import LESS, MORE, LoraTag, ReadPrompt, Segment, read_prompt

__all__ = ["LESS", "LORAS_LIMIT", "LORA_WEIGHT_LIMIT", "MORE", "LoraTag", "ReadPrompt", "Segment", "read_prompt"]
