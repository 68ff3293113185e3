"""The page shows packages, whatever the window, and finds them."""

import json
import re
import shutil
import subprocess

import pytest
from audit.report import describe
from audit.sources import load
from audit.tree import NODES_MAX
from audit.treemap import as_html

PLATFORM = "linux/amd64"
SITE = "usr/lib/python3/site-packages"
RECORD = b"numpy/__init__.py,,\nnumpy/core.so,,\nnumpy-2.4.0.dist-info/RECORD,,\n"
LAYER = {
    f"{SITE}/numpy/__init__.py": b"x" * 1000,
    f"{SITE}/numpy/core.so": b"y" * 50_000,
    f"{SITE}/numpy/__pycache__/__init__.cpython-311.pyc": b"z" * 2000,
    f"{SITE}/numpy-2.4.0.dist-info/RECORD": RECORD,
    "usr/lib/x86_64-linux-gnu/libc.so.6": b"c" * 30_000,
    "opt/weights/model.safetensors": b"w" * 90_000,
    "opt/a/</script><b>": b"q" * 9_000,
    "top": b"t" * 4_000,
}


@pytest.fixture
def described(layout):
    return describe(load(layout.add("it", [LAYER]), PLATFORM))


def test_the_tree_leads_from_reasons_to_packages_to_files_and_its_sums_are_those_of_the_image(described):
    tree = {name: (size, {row[0]: row for row in rows}) for name, size, rows in described["tree"]}
    assert sum(size for size, _ in tree.values()) == described["rootfs_bytes"]
    size, packages = tree["Python packages"]
    assert size == packages["numpy 2.4.0"][1] == 53_000 + len(RECORD)
    assert packages["numpy 2.4.0"][2][0][0] == "numpy"
    assert tree["weights"] == (90_000, {"opt/weights": ["opt/weights", 90_000, [["model.safetensors", 90_000, []]]]})
    assert {"usr/lib/x86_64-linux-gnu", "opt/a/<", "/"} <= set(tree["system"][1])


def test_many_small_files_are_summed_up(layout):
    described = describe(load(layout.add("it", [{f"d{n % 50}/{n}": b"x" * 10 for n in range(20_000)}]), PLATFORM))

    def count(rows):
        return sum(1 + count(row[2]) for row in rows)

    assert count(described["tree"]) <= 2 * NODES_MAX
    assert sum(row[1] for row in described["tree"]) == 200_000


def page_of(described):
    ready = {"fetch_bytes": 0, "unpack_bytes": 0, "seconds": {}}
    return as_html({"images": [{**described, "ready": ready}], "set": {}, "broken": []})


def test_the_page_has_the_packages_and_a_search_and_no_name_ends_its_script(described):
    page = page_of(described)
    [data] = re.findall(r'<script type="application/json">(.*?)</script>', page)
    assert "numpy 2.4.0" in data
    assert {row[0] for row in json.loads(data)} == {"Python packages", "system", "weights"}
    assert 'type="search"' in page
    assert "</script><b>" not in page


@pytest.mark.parametrize("window", ["500,400", "1600,1000"])
def test_a_browser_draws_packages_and_finds_them(described, tmp_path, window):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser here")
    (tmp_path / "page.html").write_text(page_of(described))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile",
               f"--window-size={window}", "--virtual-time-budget=2000", "--dump-dom",
               f"file://{tmp_path}/page.html#numpy"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    titles = re.findall(r'<div[^>]*title="([^"]*)"', done.stdout)
    assert "Python packages / numpy 2.4.0: 53.1 kB" in titles
    assert "1 found, 53.1 kB" in done.stdout
    assert 'class="hit"' in done.stdout
