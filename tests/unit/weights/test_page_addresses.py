"""Addresses that people copy from a hub's page."""

import pytest

from services.weights.references.pages import file_addresses

HUB = "https://hub.example"


@pytest.mark.parametrize(
    ("url", "addresses"),
    [
        ("https://hub.example/o/m/blob/main/a.safetensors", ["https://hub.example/o/m/resolve/main/a.safetensors"]),
        ("https://huggingface.co/o/m/blob/a%2Fb/x/y.bin?q=1", ["https://huggingface.co/o/m/resolve/a%2Fb/x/y.bin?q=1"]),
        ("https://huggingface.co/datasets/o/d/blob/main/a", ["https://huggingface.co/datasets/o/d/resolve/main/a"]),
        ("https://github.com/o/m/blob/main/a.pth", ["https://github.com/o/m/raw/main/a.pth"]),
        ("https://hub.example/o/m/resolve/main/blob/a", ["https://hub.example/o/m/resolve/main/blob/a"]),
        ("https://hub.example/o/m/resolve/main/a", ["https://hub.example/o/m/resolve/main/a"]),
        ("https://files.example/blob/a/b", ["https://files.example/blob/a/b"]),
        (
            "https://files.example/o/m/blob/main/a",
            ["https://files.example/o/m/resolve/main/a", "https://files.example/o/m/blob/main/a"],
        ),
    ],
)
def test_a_page_leads_to_its_file(url, addresses):
    assert list(file_addresses(url, hub=HUB)) == addresses
