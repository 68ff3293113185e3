"""The command: formats, budgets, comparisons, exit codes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from audit.budget import broken
from audit.model import Image, Layer

PROGRAM = Path(__file__).parents[3] / "docker" / "size_audit.py"
SITE = "usr/lib/python3.11/site-packages"
RECORD = b"cv2/__init__.py,sha256=x,9\nopencv_python-5.0.dist-info/RECORD,,\n"
BASE = {"usr/bin/base": b"b" * 40_000}
APP = {
    f"{SITE}/cv2/__init__.py": b"c" * 9000,
    f"{SITE}/opencv_python-5.0.dist-info/RECORD": RECORD,
    "models/unet.safetensors": bytes(range(256)) * 80,
}


def audit(*arguments):
    return subprocess.run([sys.executable, PROGRAM, *arguments], capture_output=True, text=True, timeout=60)


@pytest.fixture
def image(layout):
    return layout.add("app", [BASE, APP])


def test_json_says_layers_distributions_findings_and_the_set(image, layout):
    other = layout.add("other", [BASE, {"x": b"x" * 100}])
    said = json.loads(audit(image, other, "--format", "json").stdout)

    first, second = said["images"]
    assert first["name"] == image
    assert [layer["unpacked_bytes"] for layer in first["layers"]] == [40_000, 9000 + len(RECORD) + 20_480]
    assert first["distributions"] == [
        {"name": "opencv_python", "version": "5.0", "files": 2, "bytes": 9000 + len(RECORD)}
    ]
    assert first["reasons"]["weights"] == 20_480
    shared = first["layers"][0]["compressed_bytes"]
    assert said["set"] == {
        "compressed_bytes": first["compressed_bytes"] + second["compressed_bytes"] - shared,
        "shared_bytes": shared,
    }


def test_a_node_that_holds_the_base_fetches_the_rest(image, layout):
    held = layout.add("base", [BASE])
    said = json.loads(audit(image, "--held", held, "--link-mbps", "8", "--format", "json").stdout)["images"][0]

    assert said["ready"]["fetch_bytes"] == said["layers"][1]["compressed_bytes"]
    assert list(said["ready"]["seconds"]) == ["8"]


def test_a_broken_budget_is_named_and_fails(image, tmp_path):
    budget = tmp_path / "budget.toml"
    budget.write_text('[images.app]\nmatch = "*:app"\nabove = 1\ncompressed_bytes = 10\n[set]\ncompressed_bytes = 10\n')
    out = audit(image, "--budget", str(budget))

    assert out.returncode == 1
    assert "compressed_bytes is" in out.stderr
    assert "the set" in out.stderr


def test_a_kept_budget_passes(image, tmp_path):
    (tmp_path / "budget.toml").write_text("[images.app]\ncompressed_bytes = 1000000\nkinds = {duplicate = 0}\n")

    assert audit(image, "--budget", str(tmp_path / "budget.toml")).returncode == 0


def test_a_weights_plan_has_a_budget(image, tmp_path):
    (tmp_path / "budget.toml").write_text("[weights.slim]\nfetch_bytes = 99\n")
    (tmp_path / "plan.json").write_text('{"fetch_bytes": 100}')
    out = audit(image, "--budget", str(tmp_path / "budget.toml"), "--plan", f"slim={tmp_path}/plan.json")

    assert out.returncode == 1
    assert "weights slim" in out.stderr


def test_more_than_the_platform_takes_is_always_too_much():
    def image(size_bytes):
        return Image(name="it", digest="", layers=(Layer(digest="x", diff_id="x", compressed_bytes=size_bytes),))

    assert broken({}, [image(35_000_000_000)], {}) == []
    (line,) = broken({}, [image(35_000_000_001)], {})
    assert "the platform takes 35,000,000,000" in line


@pytest.mark.parametrize(
    "text",
    [
        "[image.app]",
        "[images.app]\ncompresed_bytes = 1",
        "[images.app]\ncompressed_bytes = '1 MB'",
        "[images.app]\nkinds = {tests = -1}",
        "[set]\nunpacked_bytes = 1",
        "[weights.x]\nbytes = 1",
        "[more.x]\nmatch = 'x'",
        "images = 3",
        "not toml",
    ],
)
def test_a_budget_that_nobody_would_keep_is_refused(image, tmp_path, text):
    (tmp_path / "budget.toml").write_text(text)
    out = audit(image, "--budget", str(tmp_path / "budget.toml"))
    assert out.returncode == 2
    assert out.stderr.count("\n") == 1
    assert "Traceback" not in out.stderr


def test_layers_say_which_other_images_have_them(image, layout):
    other = layout.add("other", [BASE, {"x": b"x" * 100}])
    first, second = json.loads(audit(image, other, "--format", "json").stdout)["images"]
    assert [layer["shared_with"] for layer in first["layers"]] == [[other], []]
    assert [layer["shared_with"] for layer in second["layers"]] == [[image], []]


def test_the_program_is_whole_without_the_repository(image, tmp_path):
    shutil.copy(PROGRAM, tmp_path)
    shutil.copytree(PROGRAM.parent / "audit", tmp_path / "audit")
    command = [sys.executable, "-ES", tmp_path / "size_audit.py", image]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env={"PATH": os.environ["PATH"]})
    assert done.returncode == 0, done.stderr


def test_two_builds_are_compared_path_by_path(image, layout):
    later = layout.add("later", [BASE, {**APP, "new": b"n" * 5000}])
    against = json.loads(audit(later, "--against", image, "--format", "json").stdout)["images"][0]["against"]

    assert against["same_layers"] == 1
    assert against["paths"] == [{"path": "new", "bytes": 5000, "why": "new"}]


@pytest.mark.parametrize(("form", "mark"), [("table", "what to fix"), ("markdown", "|---|"), ("html", 'class="map"')])
def test_every_format_says_the_same_totals(image, form, mark):
    out = audit(image, "--format", form)

    assert out.returncode == 0
    assert mark in out.stdout
    assert "opencv_python" in out.stdout or form == "html"


def test_the_page_needs_nothing_from_elsewhere(image):
    assert "http" not in audit(image, "--format", "html").stdout


def test_an_image_that_cannot_be_read_is_one_line_and_exit_code_2():
    out = audit("oci:/nowhere")

    assert out.returncode == 2
    assert out.stderr.count("\n") == 1
    assert "Traceback" not in out.stderr


def test_a_second_service_may_cost_so_much_more(layout, tmp_path):
    base = {"base": b"b" * 5000}
    first = layout.add("first", [base, {"torch": os.urandom(50_000)}])
    second = layout.add("second", [base, {"app": os.urandom(20_000)}])
    budget = tmp_path / "budget.toml"
    rule = '[more.second]\nmatch = "*:second"\nheld = ["*:first"]\ncompressed_bytes = {}\n'
    budget.write_text(rule.format(19_000))
    done = audit(first, second, "--budget", budget)
    assert done.returncode == 1
    assert "bytes more" in done.stderr
    budget.write_text(rule.format(22_000))
    assert audit(first, second, "--budget", budget).returncode == 0


def test_a_package_is_one_wherever_it_was_installed(layout):
    record = b"tool/x.py,,\ntool-1.0.dist-info/RECORD,,\n"
    name = layout.add("it", [{"opt/lib/tool/x.py": b"x" * 900, "opt/lib/tool-1.0.dist-info/RECORD": record}])
    reasons = json.loads(audit(name, "--format", "json").stdout)["images"][0]["reasons"]
    assert reasons["Python packages"] == 900 + len(record)
