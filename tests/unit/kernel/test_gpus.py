import ctypes

import pytest

from services.kernel import process
from services.kernel.config import SettingsError


class Driver:
    """NVIDIA's library with so many GPUs; with an `error` it cannot be used."""

    def __init__(self, found: int, *, error: int = 0) -> None:
        self._found = found
        self._error = error

    def cuInit(self, flags: int) -> int:
        return self._error

    def cuDeviceGetCount(self, found: object) -> int:
        ctypes.cast(found, ctypes.POINTER(ctypes.c_int))[0] = self._found
        return 0


def absent(name: str) -> Driver:
    raise OSError(name)


@pytest.mark.parametrize(
    ("driver", "found"), [(absent, 0), (lambda name: Driver(2), 2), (lambda name: Driver(2, error=100), 0)]
)
def test_gpus_are_those_that_a_working_driver_shows(driver, found, monkeypatch):
    monkeypatch.setattr(process.ctypes, "CDLL", driver)
    assert process.count_gpus() == found


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1"])
def test_a_device_that_exists_is_accepted(device, monkeypatch):
    monkeypatch.setattr(process, "count_gpus", lambda: 2)
    process.check_device(device, setting="FANLIGHT_X_DEVICE")


@pytest.mark.parametrize(("device", "found"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_missing_gpu_is_reported_at_once(device, found, monkeypatch):
    monkeypatch.setattr(process, "count_gpus", lambda: found)
    with pytest.raises(SettingsError, match=f"FANLIGHT_X_DEVICE is {device}, .* shows {found} GPUs .*set auto or cpu"):
        process.check_device(device, setting="FANLIGHT_X_DEVICE")


@pytest.mark.parametrize("service", ["diffusion", "preprocessor"])
def test_no_service_starts_for_a_gpu_that_is_not_there(service, monkeypatch, capsys):
    main = pytest.importorskip(f"services.{service}.__main__").main
    monkeypatch.setattr(process, "count_gpus", lambda: 0)
    monkeypatch.setenv(f"FANLIGHT_{service.upper()}_DEVICE", "cuda")
    assert main() == 2
    assert f"error: FANLIGHT_{service.upper()}_DEVICE is cuda" in capsys.readouterr().err


class DriverOfCard(Driver):
    def __init__(self, name: bytes, capability: tuple[int, int]) -> None:
        super().__init__(1)
        self._name = name
        self._by_attribute = {75: capability[0], 76: capability[1]}

    def cuDeviceGet(self, device: object, number: int) -> int:
        return 0

    def cuDeviceGetName(self, name: object, size: int, device: object) -> int:
        name.value = self._name
        return 0

    def cuDeviceGetAttribute(self, found: object, attribute: int, device: object) -> int:
        ctypes.cast(found, ctypes.POINTER(ctypes.c_int))[0] = self._by_attribute[attribute]
        return 0


def test_a_card_is_known_by_its_name_and_capability(monkeypatch):
    monkeypatch.setattr(process.ctypes, "CDLL", lambda name: DriverOfCard(b"NVIDIA GeForce GTX 1660", (7, 5)))
    assert process.card_of(0) == ("NVIDIA GeForce GTX 1660", (7, 5))
    assert process.card_of(1) is None


def test_without_a_driver_no_card_is_known(monkeypatch):
    monkeypatch.setattr(process.ctypes, "CDLL", absent)
    assert process.card_of(0) is None
