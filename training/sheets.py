"""Contact sheets: images in a grid with a line of text under each.

`python -m training.sheets` puts what evaluation drew into training/samples, small enough to commit.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from training.measures import to_bytes
from training.parallel import OUT

SAMPLES = Path(__file__).parent / "samples"
SHOWN = ("prompts", "short_prompts", "seeds", "control", "lora", "inversion", "vae")
QUALITY = 80
CELL_PX, TEXT_PX, GAP_PX = 96, 16, 4


def write_sheet(path: Path, images: list[np.ndarray], lines: list[str], columns: int = 8) -> None:
    """Write images in [0, 1], each enlarged to 96 pixels, as one PNG."""
    rows = -(-len(images) // columns)
    wide, high = CELL_PX + GAP_PX, CELL_PX + TEXT_PX + GAP_PX
    sheet = Image.new("RGB", (columns * wide, rows * high), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (image, line) in enumerate(zip(images, lines, strict=True)):
        left, top = index % columns * wide, index // columns * high
        sheet.paste(Image.fromarray(to_bytes(image)).resize((CELL_PX, CELL_PX), Image.BICUBIC), (left, top))
        pen.text((left + 1, top + CELL_PX + 1), line[:17], fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def main() -> None:
    """Write the sheets that the model card shows as WebP."""
    SAMPLES.mkdir(exist_ok=True)
    for name in SHOWN:
        Image.open(OUT / "evaluation" / f"{name}.png").save(SAMPLES / f"{name}.webp", quality=QUALITY, method=6)


if __name__ == "__main__":
    main()
