"""What leaves the memory gives its room back."""

from services.gateway.adapters.recent_blobs import RecentBlobs
from services.kernel.blobs import BlobInfo


def test_what_was_cleared_takes_no_room_from_what_comes_after() -> None:
    recent = RecentBlobs(limit_bytes=10, now_s=lambda: 0.0)

    def add(name: str) -> str:
        info = BlobInfo(scope="s", digest=name, size_bytes=8, media_type="image/png")
        recent.add(info, [b"8 bytes."])
        return name

    add("before")
    recent.clear()
    assert recent.get("s", "before") is None
    assert recent.get("s", add("after")) is not None
