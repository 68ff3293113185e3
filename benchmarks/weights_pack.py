"""How much smaller packed weights are, and how fast they unpack on one core, digests included and bit by bit the same.

On the weights that ship with Fanlight, which were really trained, and on fp16 drawn around 0. CPU seconds are counted,
so that a busy machine changes little. Run: `python -m benchmarks.weights_pack [--bytes 200000000]`.
"""

import argparse
import hashlib
import tempfile
import time
from pathlib import Path

import numpy as np

from services.weights.files import read_table, sha256_of
from services.weights.packing import unpack
from services.weights.publishing import pack_file

STARTER = Path(__file__).parent.parent / "fanlight" / "starter"


def measure(name: str, files: list[Path], folder: Path) -> None:
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
    gbps = original * 8e-9
    print(f"| {name} | {packed / original:.3f} | {gbps / pack_s:.1f} | {gbps / unpack_s:.1f} |")


def drawn(folder: Path, size: int) -> Path:
    from safetensors.numpy import save_file

    path, rows = folder / "drawn.safetensors", 64
    values = np.random.default_rng(1).normal(0, 0.02, (rows, size // 2 // rows)).astype(np.float16)
    save_file({f"layer{number}": row for number, row in enumerate(values)}, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=200_000_000)
    size = parser.parse_args().bytes
    print("| weights | packed to | packs, Gbit/s of a core | unpacks and checks, Gbit/s of a core |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measure("the starter model and what goes with it", sorted(STARTER.rglob("*.safetensors")), folder)
        measure("fp16 drawn around 0", [drawn(folder, size)], folder)


if __name__ == "__main__":
    main()
