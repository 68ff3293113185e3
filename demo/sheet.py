"""Writes images to files, and all of them to one contact sheet. Knows no service."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

TILE_PX = 256
TITLE_PX = 36
GAP_PX = 12
COLUMNS = 4
PAPER = (250, 250, 247)
INK = (40, 40, 40)
TITLE_LETTERS = 34


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    # The file to write; empty for an image that is on disk already.
    file: str
    title: str
    # An encoded image.
    data: bytes


def write_sheet(tiles: Sequence[Tile], folder: Path) -> None:
    """The tiles' own files, and sheet.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for tile in tiles:
        if tile.file:
            (folder / tile.file).write_bytes(tile.data)
    rows = -(-len(tiles) // COLUMNS)
    size = (GAP_PX + COLUMNS * (TILE_PX + GAP_PX), GAP_PX + rows * (TILE_PX + TITLE_PX + GAP_PX))
    sheet = Image.new("RGB", size, PAPER)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, COLUMNS)
        _paste(sheet, tile, GAP_PX + column * (TILE_PX + GAP_PX), GAP_PX + row * (TILE_PX + TITLE_PX + GAP_PX))
    sheet.save(folder / "sheet.png")


def _paste(sheet: Image.Image, tile: Tile, left: int, top: int) -> None:
    with Image.open(io.BytesIO(tile.data)) as image:
        sheet.paste(image.convert("RGB").resize((TILE_PX, TILE_PX), Image.Resampling.LANCZOS), (left, top))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for line, text in enumerate(_lines(tile.title)):
        pen.text((left, top + TILE_PX + 2 + 16 * line), text, fill=INK, font=font)


def _lines(title: str) -> list[str]:
    """At most two lines."""
    if len(title) <= TITLE_LETTERS:
        return [title]
    cut = title.rfind(" ", 0, TITLE_LETTERS)
    return [title[:cut], title[cut + 1 :]]
