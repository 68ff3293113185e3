"""Exponential back-off with jitter: the pause before a retry. Pure: the random number is an argument.

Clients, workers, downloads and the supervisor use it, each with its own first and longest pause.
"""

FIRST_PAUSE_S = 0.2
DOUBLINGS_MAX = 16


def backoff_s(failures: int, *, longest_s: float, chance: float, first_s: float = FIRST_PAUSE_S) -> float:
    """The pause after `failures` earlier failures in a row: it doubles from `first_s` up to `longest_s`.

    `chance`, 0 to 1, is the jitter: it scales the pause to between half and all of it, so that callers do not all retry
    at the same time.
    """
    return min(longest_s, first_s * 2.0 ** min(failures, DOUBLINGS_MAX)) * (0.5 + chance / 2)
