"""The GPUs that this process may use, counted without loading a network library."""

import ctypes

from services.kernel.config import SettingsError

_CUDA = "cuda"


def count() -> int:
    """How many NVIDIA's driver shows; none where there is no driver, or none that works."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    found = ctypes.c_int()
    works = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(found)) == 0
    return found.value if works else 0


def check_device(wanted: str, *, setting: str) -> None:
    """SettingsError where a GPU is wanted, as `cuda` or `cuda:N`, that is not there: no work would ever succeed."""
    kind, _, number = wanted.partition(":")
    if kind != _CUDA:
        return
    found = count()
    if int(number or 0) >= found:
        raise SettingsError(
            f"{setting} is {wanted}, and NVIDIA's driver shows {found} GPUs to this process; set auto or cpu, or let it"
            " see the GPU"
        )
