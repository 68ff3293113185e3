"""Figures of a checkout that is made for each test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.structure import measure

SCRIPT = Path(__file__).parents[3] / "scripts" / "structure.py"


@pytest.fixture
def house(tmp_path):
    """Writes files and measures them."""

    def build(name: str = "clip_skip", **files: str):
        for path, text in {"fanlight/__init__.py": "", **files}.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return measure(tmp_path, name)

    return build


def test_places_are_files_outside_tests_docs_and_stubs(house):
    named = "clip_skip_of = 1\n"
    outside = ["tests/a.py", "docs/a.py", "fanlight/a_pb2.py", ".venv/a.py", "fanlight/a.md"]
    places = ["fanlight/a.py", "protos/a.proto", "services/b/loop.c", "benchmarks/tests/a.py"]

    figures = house(**dict.fromkeys([*outside, *places], named), **{"services/c.py": "skip = 1\n"})

    assert figures.places == sorted(places)


def test_stubs_are_no_modules_and_empty_files_have_no_part_in_the_grain(house):
    figures = house(**{"services/gateway/a.py": "x = 1\n" * 100, "fanlight/a_pb2.py": "x = 1\n" * 900})

    assert (figures.modules, figures.lines, figures.gateway_lines) == (2, 100, 100)
    assert figures.files_per_1000_lines == 10.0
    assert (figures.file_lines.median, figures.largest_file) == (100, "services/gateway/a.py")


def test_small_modules_with_one_importer_are_found_however_they_are_imported(house):
    figures = house(
        **{
            "services/a.py": "from services.room import small\nfrom services.room.once import x\n",
            "services/d.py": "import services.wide\n",
            "services/b.py": "from services.room.twice import x\n",
            "services/c.py": "def f():\n    from services.room import twice\n",
            "services/room/__init__.py": "",
            "services/room/inner.py": "from .near import x\n",
            "services/room/near.py": "x = 1\n",
            "services/room/small.py": "x = 1\n",
            "services/room/once.py": "x = 1\n",
            "services/room/twice.py": "x = 1\n",
            "services/wide.py": "x = 1\n" * 60,
        }
    )

    assert figures.small_with_one_importer == [
        "services/room/near.py",
        "services/room/once.py",
        "services/room/small.py",
    ]


def test_a_protocol_and_its_implementations_are_one_meaning(house):
    protocol = "class {0}(Protocol):\n    def get(self): ...\n    def put(self): ...\n"
    figures = house(
        **{
            "services/ports.py": "".join(map(protocol.format, ["Store", "Blobs"]))
            + "class Plan: ...\nclass _Own: ...\n",
            "services/a.py": "class Store:\n    def get(self): ...\n    def put(self): ...\n    def more(self): ...\n",
            "services/b.py": "class Store(ports.Store): ...\nclass Blobs:\n    def get(self): ...\n",
            "services/c.py": "class Plan: ...\nclass _Own: ...\n",
        }
    )

    assert figures.names_of_several_classes == {
        "Blobs": ["services/b.py", "services/ports.py"],
        "Plan": ["services/c.py", "services/ports.py"],
    }


@pytest.mark.parametrize(
    ("docstring", "given"),
    [
        ("Pixels (B, 3, H, W) in [-1, 1] to latents (B, C, H/f, W/f).", True),
        ("A map (h, w).", True),
        ("Numbers (see the paper, and its code).", False),
        ("", False),
    ],
)
def test_a_docstring_gives_shapes_or_does_not(house, docstring, given):
    text = f'class Net:\n    def forward(self, x: "torch.Tensor") -> None:\n        """{docstring}"""\n'
    private = "def _inner(x: np.ndarray) -> None: ...\ndef number(x: int) -> int: ...\n"

    figures = house(**{"services/net.py": text + private})

    assert (figures.array_functions, figures.array_functions_with_shapes) == (1, int(given))


def test_functions_are_counted_from_def_to_end(house):
    figures = house(**{"services/a.py": "@decorated\ndef f():\n    x = 1\n    return x\n\n\nasync def g(): ...\n"})

    assert (figures.function_lines.max, figures.longest_function) == (3, "services/a.py:2 f")


def test_the_script_prints_json(house, tmp_path):
    house(**{"services/a.py": "x = 'strength'\n"})
    command = [sys.executable, SCRIPT, "--root", tmp_path, "--name", "strength", "--json"]

    printed = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)

    assert printed["places"] == ["services/a.py"]
