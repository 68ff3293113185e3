"""The model card's table of measurements, made of what evaluation wrote. Measures nothing.

`python -m training.figures` puts it into docs/starter-model.md, between its two marks; exit code 1 says that a target
is missed.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.parallel import OUT

CARD = Path(__file__).parents[1] / "docs" / "starter-model.md"
BEGIN, END = "<!-- figures begin -->", "<!-- figures end -->"
Results = Mapping[str, dict]


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureRow:
    """One line of the table; `is_met` is None where nothing is wanted."""

    what: str
    wanted: str = ""
    measured: str
    is_met: bool | None = None

    def __str__(self) -> str:
        measured = f"**{self.measured}: missed**" if self.is_met is False else self.measured
        return f"| {self.what} | {self.wanted} | {measured} |"


def percent(share: float) -> str:
    """A share as the card writes it."""
    return f"{share * 100:.1f} %"


def at_least(what: str, wanted: float, measured: float, write: Callable[[float], str] = str) -> FigureRow:
    """A figure that must not be below the wanted one."""
    return FigureRow(what=what, wanted=f"at least {write(wanted)}", measured=write(measured), is_met=measured >= wanted)


def prompt_rows(r: Results) -> list[FigureRow]:
    """How well prompts are followed."""
    held, other, short = r["prompts"]["held_in_64"], r["prompts"]["other_subjects"], r["short"]
    seeds = [short[key] for key in sorted(short)]
    rest = ", ".join(percent(other[key]) for key in ("top1", "background", "style"))
    shorts = at_least("24 short prompts, mean of three seeds", 0.85, sum(seeds) / len(seeds), percent)
    return [
        at_least("64 held-in prompts, nearest emoji", 0.95, held["top1"], percent),
        FigureRow(what="the same, among the five nearest", measured=percent(held["top5"])),
        at_least("the same, background color", 0.97, held["background"], percent),
        at_least("the same, style word (nearer of the subject's two renderings)", 0.85, held["style"], percent),
        FigureRow(what="the other subjects: emoji, color, style", measured=rest),
        shorts,
        FigureRow(what="the same, seed by seed", measured=", ".join(map(percent, seeds))),
    ]


def seed_rows(r: Results) -> list[FigureRow]:
    """How much seeds change."""
    full, names = r["seeds"]["full_prompts"], r["seeds"]["names_alone"]
    return [
        at_least("eight seeds of a full prompt, mean pixel deviation", 0.06, full["mean_deviation"]),
        FigureRow(what="the same: smallest of eight prompts; right emoji", measured=_deviation(full)),
        FigureRow(what="eight seeds of the name alone: mean deviation", measured=str(names["mean_deviation"])),
        FigureRow(what="the same: smallest of eight names; right emoji", measured=_deviation(names)),
    ]


def _deviation(seeds: Mapping[str, float]) -> str:
    return f"{seeds['smallest']}; {percent(seeds['top1'])}"


def control_rows(r: Results) -> list[FigureRow]:
    """How well control images are followed."""
    control = r["control"]
    gain = round(control["with"] - control["without"], 3)
    return [
        at_least("canny edge F1 with control, 1 pixel tolerance, 32 moved images", 0.60, control["with"]),
        at_least("the same, above what it is without control", 0.25, gain),
        FigureRow(what="the same, another object named", measured=str(control["with_another_object_named"])),
        FigureRow(what="the same, of true images through the VAE", measured=str(control["ceiling_vae"])),
    ]


def part_rows(r: Results) -> list[FigureRow]:
    """LoRA, textual inversion, VAEs, speed."""
    lora, mint, vae, speed = r["lora"], r["inversion"], r["vae"], r["speed"]
    line = ", ".join(str(lora[key]) for key in ("base", "half", "one"))
    left = max(lora["removal_differs_by"], lora["kohya_differs_by"])
    others = ", ".join(f"{word} {off}" for word, off in mint.items() if word != "<mint>")
    is_mint = mint["<mint>"] < min(off for word, off in mint.items() if word != "<mint>")
    seconds, threads = speed["seconds"], speed["threads"]
    vivid = ", ".join(str(vae["saturation"][key]) for key in ("plain", "vivid"))
    return [
        FigureRow(what="LoRA: mean distance to the cyanotype line at scale 0, 0.5, 1", measured=line),
        FigureRow(
            what="LoRA: largest difference after removal, and of the kohya file",
            wanted="0",
            measured=str(left),
            is_met=left == 0,
        ),
        FigureRow(what="background's distance to the color of `<mint>`", measured=str(mint["<mint>"]), is_met=is_mint),
        FigureRow(what="the same, other words instead", measured=others),
        FigureRow(what="VAE PSNR on 64 true images", measured=f"{vae['psnr_db']} dB"),
        FigureRow(what="saturation, plain and vivid VAE", measured=vivid),
        FigureRow(
            what=f"one image, 20 steps with guidance, {threads} threads, median of 5",
            wanted="at most 1.5 s",
            measured=f"{seconds} s",
            is_met=seconds <= 1.5,
        ),
    ]


def rows(results: Results) -> list[FigureRow]:
    """The whole table."""
    return [*prompt_rows(results), *seed_rows(results), *control_rows(results), *part_rows(results)]


def controls(results: Results) -> str:
    """What the measure itself says of true images and of wrong labels."""
    prompts = results["prompts"]
    true, coded, shuffled = (prompts[key]["top1"] for key in ("true_images", "vae_of_true_images", "labels_shuffled"))
    return (
        f"Controls: true images {percent(true)}, true images through the VAE {percent(coded)}, shuffled labels"
        f" {percent(shuffled)}."
    )


def table(results: Results) -> str:
    """The Markdown between the marks."""
    head = ["| what | target | measured |", "|---|---|---|"]
    return "\n".join([BEGIN, *head, *map(str, rows(results)), "", controls(results), END])


def put_into(card: str, written: str) -> str:
    """The card with what is between its marks replaced."""
    before, _, rest = card.partition(BEGIN)
    return before + written + rest.partition(END)[2]


def load(names: Sequence[str]) -> Results:
    """What evaluation wrote, by check."""
    return {name: json.loads((OUT / "evaluation" / f"{name}.json").read_text()) for name in names}


def main() -> int:
    """Write the card's table."""
    results = load(("prompts", "short", "seeds", "control", "lora", "inversion", "vae", "speed"))
    CARD.write_text(put_into(CARD.read_text(), table(results)))
    missed = [row.what for row in rows(results) if row.is_met is False]
    print("\n".join([table(results), *(f"missed: {what}" for what in missed)]))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
