"""Weight stores that download small files in several pieces."""

from contextlib import AbstractAsyncContextManager
from typing import Any

from services.weights.settings import MIB, WeightsLimits, WeightsSettings
from services.weights.store.store import WeightStore

PIECE_BYTES = 1 * MIB
STALL_S = 20.0


def open_store(
    settings: WeightsSettings, *, stall_s: float = STALL_S, **more: Any
) -> AbstractAsyncContextManager[WeightStore]:
    small = settings.model_copy(update={"piece_bytes": PIECE_BYTES})
    return WeightStore.open(small, limits=WeightsLimits(stall_s=stall_s), **more)
