"""Exponential back-off with jitter: how long to pause before a call is tried again. Pure: chance comes in as a number.

Clients, workers and downloads use the same; each says its own first and longest pause.
"""

FIRST_PAUSE_S = 0.2
DOUBLINGS_MAX = 16


def backoff_s(failures: int, *, longest_s: float, chance: float, first_s: float = FIRST_PAUSE_S) -> float:
    """The pause after so many failures before this one, in a row: it doubles from `first_s` up to `longest_s`.

    `chance`, from 0 up to 1, shortens it to between half and all of it, so that callers do not come back all at once.
    """
    return min(longest_s, first_s * 2.0 ** min(failures, DOUBLINGS_MAX)) * (0.5 + chance / 2)
