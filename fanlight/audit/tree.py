"""The files of an image as a tree for the treemap: what they are for, then packages or folders, then paths."""

from dataclasses import dataclass, field
from typing import Any

from .distributions import owners_of, reason_of, within_site
from .rootfs import RootFs

# A node that is smaller than this share of the image is summed up with its neighbours.
SHARE_MIN = 1 / 4000
NODES_MAX = 6000
SMALLER = "(smaller)"
# How much of a path names the package of what no distribution owns.
FOLDER_PARTS = 3
PACKAGE_LEVEL = 2


@dataclass(slots=True)
class _Node:
    size_bytes: int = 0
    below: dict[str, "_Node"] = field(default_factory=dict)

    def add(self, names: list[str], size_bytes: int) -> None:
        node = self
        node.size_bytes += size_bytes
        for name in names:
            node = node.below.setdefault(name, _Node())
            node.size_bytes += size_bytes


def tree_of(root: RootFs) -> list[Any]:
    """Nested rows of name, bytes and rows below, the largest first; the sums are those of all files."""
    top, owners = _Node(), owners_of(root)
    for entry in root.files():
        owner = owners.get(entry.path)
        parts = entry.path.split("/")
        if owner is None:
            folder = "/".join(parts[:-1][:FOLDER_PARTS]) or "/"
            package, rest = folder, parts[len(parts[:-1][:FOLDER_PARTS]) :]
        else:
            package, rest = " ".join(owner), within_site(entry.path).split("/")
        top.add([reason_of(entry.path, is_owned=owner is not None), package, *rest], entry.size_bytes)
    smallest = top.size_bytes * SHARE_MIN
    while _count(top, smallest) > NODES_MAX:
        smallest *= 2
    return _rows(top, smallest, level=1)


def _count(node: _Node, smallest: float) -> int:
    return 1 + sum(_count(each, smallest) for each in node.below.values() if each.size_bytes >= smallest)


def _rows(node: _Node, smallest: float, level: int) -> list[Any]:
    ordered = sorted(node.below.items(), key=lambda item: (-item[1].size_bytes, item[0]))
    large = [(name, each) for name, each in ordered if each.size_bytes and each.size_bytes >= smallest]
    rows = [_row(name, each, smallest, level) for name, each in large]
    left = node.size_bytes - sum(row[1] for row in rows)
    return [*rows, [f"{len(ordered) - len(rows)} {SMALLER}", left, []]] if node.below and left else rows


def _row(name: str, node: _Node, smallest: float, level: int) -> list[Any]:
    """Folders with nothing else in them are one row; packages have one of their own."""
    while level > PACKAGE_LEVEL and len(node.below) == 1:
        [(inner, only)] = node.below.items()
        name, node = f"{name}/{inner}", only
    return [name, node.size_bytes, _rows(node, smallest, level + 1)]
