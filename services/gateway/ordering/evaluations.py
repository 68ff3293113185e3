"""How long one evaluation of a model takes on a worker at a size, also where that was never measured. Pure."""

from services.gateway.ordering.tasks import USUAL_SIZE_CLASS, USUAL_STEP_S, StepTimes, WorkerView


def step_s(view: WorkerView, family: str, size_class: int) -> float:
    """Seconds; family empty or size class 0 where they are not known.

    What the worker measured itself counts first: that class, then the nearest class of the family. Then what is usual
    on its device. A family that neither knows goes by the others that the worker knows: they tell how fast it is.
    """
    own, usual = view.step_times, view.usual_times
    known = own.get((family, size_class))
    if known is None:
        known = _nearest(own, family, size_class)
    if known is None:
        known = usual.get((family, size_class))
    if known is None:
        known = _nearest(usual, family, size_class)
    if known is None:
        known = _nearest(own, "", size_class)
    return USUAL_STEP_S * _times(size_class or USUAL_SIZE_CLASS, USUAL_SIZE_CLASS) if known is None else known


def _nearest(times: StepTimes, family: str, size_class: int) -> float | None:
    """The mean of those in the nearest class, in proportion to pixels; None where there are none.

    Attention grows faster than pixels, but a class or two away that matters little. For an empty family all count.
    Where the size is not known the family's middle class counts, as it is.
    """
    of_family = sorted((each, time_s) for (name, each), time_s in times.items() if not family or name == family)
    if not of_family:
        return None
    if not size_class:
        return of_family[len(of_family) // 2][1]
    distance = min(abs(each - size_class) for each, _ in of_family)
    found = [time_s * _times(size_class, each) for each, time_s in of_family if abs(each - size_class) == distance]
    return sum(found) / len(found)


def _times(size_class: int, other: int) -> float:
    """How many times as many pixels; a class is a power of two of them."""
    factor: float = 2.0 ** (size_class - other)
    return factor
