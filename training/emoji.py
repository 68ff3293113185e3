"""Fetch the emoji packs with npm and render them to square RGBA sprites. Knows packs, not captions."""

import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image, ImageFilter

DATA = Path(__file__).parent / "data"
SPRITES = DATA / "sprites.npz"
SPRITE_PX = 128
PACKS = {
    "3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "noto": "@iconify-json/noto@1.2.9",
}
CATEGORIES = {
    "Animals & Nature",
    "Food & Drink",
    "Activities",
    "Travel & Places",
    "Objects",
    "Smileys & Emotion",
}


def archive(style: str) -> Path:
    """The path that `npm pack` gives the pack of one style."""
    return DATA / "npm" / (PACKS[style].removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz")


def fetch() -> None:
    """Download the packs that are not here yet; npm checks their integrity."""
    folder = DATA / "npm"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [PACKS[style] for style in PACKS if not archive(style).exists()]
    if missing:
        subprocess.run(["npm", "pack", "--silent", *missing], cwd=folder, check=True)


def read_pack(style: str) -> dict[str, bytes]:
    """Every file of one pack by its path inside the package."""
    with tarfile.open(archive(style)) as tar:
        return {m.name.removeprefix("package/"): tar.extractfile(m).read() for m in tar if m.isfile()}


def render_svg(icons: dict, name: str) -> Image.Image:
    """One icon of an iconify pack, following its alias if it is one."""
    icon = icons["icons"].get(name) or icons["icons"][icons["aliases"][name]["parent"]]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    size = f'viewBox="0 0 {width} {height}" width="{SPRITE_PX}" height="{SPRITE_PX}"'
    svg = f"{head} {size}>{icon['body']}</svg>"
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SPRITE_PX, height=SPRITE_PX))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def with_shadow(image: Image.Image) -> Image.Image:
    """A soft shadow below right: the main difference between the 3D and the flat style at 64 pixels."""
    small = image.resize((112, 112), Image.LANCZOS)
    alpha = Image.new("L", (SPRITE_PX, SPRITE_PX))
    alpha.paste(small.getchannel("A"), (12, 14))
    shadow = Image.new("RGBA", alpha.size)
    shadow.putalpha(alpha.filter(ImageFilter.GaussianBlur(4)).point(lambda value: int(value * 0.45)))
    shadow.alpha_composite(small, (4, 2))
    return shadow


def code_point(path: str) -> str:
    """The code point of a file name, without the variation selector that packs write or leave out."""
    return Path(path).stem.replace("-fe0f", "")


def shared_emoji(files: dict[str, dict[str, bytes]]) -> list[tuple[str, str, str]]:
    """(code point, Fluent name, Noto name) of each emoji that all three packs draw, in the order of names."""
    flat, noto = (json.loads(files[style]["chars.json"]) for style in ("flat", "noto"))
    categories = json.loads(files["noto"]["metadata.json"])["categories"]
    wanted = {icon for category in CATEGORIES for icon in categories.get(category, [])}
    drawn = {code_point(path) for path in files["3d"]}
    found = {}
    for code, name in sorted(flat.items()):
        if noto.get(code) in wanted and code_point(code) in drawn:
            found.setdefault(name, (code, name, noto[code]))
    return sorted(found.values(), key=lambda entry: entry[1])


def render(files: dict[str, dict[str, bytes]], emoji: list[tuple[str, str, str]]) -> dict[str, np.ndarray]:
    """uint8 (N, 128, 128, 4) for each style, rows in the order of `emoji`."""
    flat, noto = (json.loads(files[style]["icons.json"]) for style in ("flat", "noto"))
    webp = {code_point(path): data for path, data in files["3d"].items()}
    rows: dict[str, list[np.ndarray]] = {style: [] for style in PACKS}
    for code, fluent_name, noto_name in emoji:
        image = Image.open(io.BytesIO(webp[code_point(code)])).convert("RGBA")
        rows["3d"].append(np.asarray(with_shadow(image)))
        rows["flat"].append(np.asarray(render_svg(flat, fluent_name)))
        rows["noto"].append(np.asarray(render_svg(noto, noto_name)))
    return {style: np.stack(images) for style, images in rows.items()}


def main() -> None:
    """Fetch, render, and write data/sprites.npz."""
    fetch()
    files = {style: read_pack(style) for style in PACKS}
    emoji = shared_emoji(files)
    names = np.array([name for _, name, _ in emoji])
    np.savez_compressed(SPRITES, names=names, **render(files, emoji))
    print(f"{len(names)} emoji in {len(PACKS)} styles: {SPRITES.relative_to(DATA.parent)}")


if __name__ == "__main__":
    main()
