"""Which number type models compute in on a card. Loads no torch: a worker announces it before torch is imported."""

import re

FLOAT32, FLOAT16, BFLOAT16 = "float32", "float16", "bfloat16"
AUTO = "auto"
# Ampere, the first that computes in bfloat16; below the other one half precision is not computed in at all.
_BFLOAT16_FROM, _FLOAT16_FROM = (8, 0), (5, 3)
# The chips TU116 and TU117, which have the capability of the other Turing cards: Stable Diffusion gives NaN on them in
# half precision.
_TU11X = re.compile(r"\b(GTX 16\d\d|MX[45]50|T[4-6]00|T5[05]0|T1[02]00|T1000|T2000|CMP 30HX)\b", re.IGNORECASE)


def precision_of_card(name: str, capability: tuple[int, int]) -> str:
    """`name`: as the driver has it, such as `NVIDIA GeForce GTX 1660`. `capability`: CUDA's, such as (7, 5)."""
    if capability >= _BFLOAT16_FROM:
        return BFLOAT16
    is_turing = capability == (7, 5)
    return FLOAT32 if capability < _FLOAT16_FROM or (is_turing and _TU11X.search(name)) else FLOAT16
