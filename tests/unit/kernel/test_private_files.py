"""What belongs to others, or to all users, is left as it is; the rest is closed to them."""

import os
import stat
from pathlib import Path

import pytest

from services.kernel.private_files import make_private


@pytest.fixture(autouse=True)
def usual_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_a_new_folder_is_its_owners_alone(tmp_path: Path) -> None:
    make_private(tmp_path / "a" / "data", ("store",))
    assert mode(tmp_path / "a" / "data") == 0o700


def test_named_files_and_trees_of_an_earlier_version_are_closed_and_others_left(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "blobs" / "deep").mkdir(parents=True)
    for name in ("store", "blobs/deep/blob", "mine"):
        (tmp_path / name).touch()
    (tmp_path / "blobs" / "deep" / "run").touch(0o755)
    make_private(tmp_path, ("store", "blobs", "absent"))
    assert {each.name: mode(each) for each in tmp_path.rglob("*")} == {
        "store": 0o600,
        "blobs": 0o700,
        "deep": 0o700,
        "blob": 0o600,
        "run": 0o700,
        "mine": 0o644,
    }
    assert mode(tmp_path) == 0o700


def test_a_folder_that_is_meant_for_all_users_stays_open(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    (tmp_path / "store").touch()
    make_private(tmp_path, ("store",))
    assert mode(tmp_path) == 0o1777
    assert mode(tmp_path / "store") == 0o600


def test_what_a_link_points_to_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "store").symlink_to(tmp_path / "elsewhere")
    make_private(tmp_path / "data", ("store",))
    assert mode(tmp_path / "elsewhere") == 0o644


def test_what_another_user_owns_is_reported_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(self: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    (tmp_path / "store").touch()
    monkeypatch.setattr(Path, "chmod", refuses)
    make_private(tmp_path, ("store",))
    assert f"path={tmp_path / 'store'} " in capsys.readouterr().out
