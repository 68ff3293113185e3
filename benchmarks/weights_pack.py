"""How much smaller packed weights are, and how fast they unpack on one core, digests included and bit by bit the same.

On the weights that ship with Fanlight, which were really trained, and on fp16 drawn around 0. CPU seconds are counted,
so that a busy machine changes little. Run: `python -m benchmarks.weights_pack [--bytes 200000000]`.
"""

import hashlib
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.figures import RATIO, Report, arguments
from services.weights.mirror.packing import pack_file, unpack
from services.weights.references.tensors import read_table, sha256_of

STARTER = Path(__file__).parent.parent / "fanlight" / "starter"


def measure(name: str, files: list[Path], folder: Path, report: Report, *, goals: bool) -> None:
    original = packed = 0
    pack_s = unpack_s = 0.0
    for path in files:
        out, table, sha256 = folder / "packed", read_table(path), sha256_of(path)
        begin_s = time.process_time()
        frames = pack_file(path, sha256, table, out)
        pack_s += time.process_time() - begin_s
        body, digest = out.read_bytes(), hashlib.sha256()
        begin_s = time.process_time()
        for frame in frames:
            part = body[frame.packed.begin : frame.packed.end]
            assert hashlib.sha256(part).hexdigest() == frame.sha256
            digest.update(unpack(part, len(frame.span)))
        unpack_s += time.process_time() - begin_s
        assert digest.hexdigest() == sha256
        original, packed = original + path.stat().st_size, packed + len(body)
    gbit = original * 8e-9
    report.add(name, packed / original, RATIO, column="packed to", goal=0.87 if goals else None)
    report.add(name, gbit / pack_s, "Gbit/s", column="packs, of a core")
    goal = 1.0 if goals else None
    report.add(name, gbit / unpack_s, "Gbit/s", column="unpacks and checks, of a core", goal=goal, at_least=True)


def drawn(folder: Path, size: int) -> Path:
    from safetensors.numpy import save_file

    path, rows = folder / "drawn.safetensors", 64
    values = np.random.default_rng(1).normal(0, 0.02, (rows, size // 2 // rows)).astype(np.float16)
    save_file({f"layer{number}": row for number, row in enumerate(values)}, path)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--bytes", type=int, default=200_000_000)
    asked = parser.parse_args(argv)
    report, files = Report(), sorted(STARTER.rglob("*.safetensors"))
    if asked.smoke:
        files = sorted(files, key=lambda path: path.stat().st_size)[:1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measure("the starter model, its ControlNet, LoRA and VAEs", files, folder, report, goals=not asked.smoke)
        random = drawn(folder, 1_000_000 if asked.smoke else asked.bytes)
        measure("fp16 drawn around 0", [random], folder, report, goals=False)
    report.save(asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
