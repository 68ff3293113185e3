"""Say in words what a scene shows, so that short and long prompts both work. Knows no pixels."""

from random import Random

from training.vocabulary import Subject

ARTICLES = ("a", "a", "a", "a", "a", "a", "the", "the", "my", "one", "")
OPENINGS = ("",) * 10 + ("a picture of ", "an emoji of ", "a drawing of ", "an icon of ")
STYLE_NAMED, COLOR_NAMED, PRIMARY_NAME = 0.85, 0.85, 0.6
STYLE_ENDINGS = {
    "3d": (", 3d style", ", 3d style", ", 3d style", " in 3d style", ", 3d render"),
    "flat": (", flat style", ", flat style", ", flat style", " in flat style", ", flat icon"),
}
COLOR_ENDINGS = (
    " on {0} background",
    " on {0} background",
    ", on {0} background",
    ", {1} background",
    " on {1}",
)


def indefinite(words: str) -> str:
    """`a` or `an`, as the words after it want it."""
    return "an" if words.startswith(("a", "e", "i", "o", "um")) else "a"


def with_article(article: str, words: str) -> str:
    """Put an article before the words; `a` becomes `an` where it must."""
    if article == "a":
        article = indefinite(words)
    return f"{article} {words}".strip()


def plain_prompt(name: str, style: str = "", color: str = "") -> str:
    """The form that the documentation recommends: a NAME on a COLOR background, STYLE style."""
    place = f" on {with_article('a', color)} background" if color else ""
    return with_article("a", name) + place + (f", {style} style" if style else "")


def caption(subject: Subject, style: str, color: str, rng: Random) -> str:
    """One random caption; article, style and color may each be left out."""
    use_alias = subject.aliases and rng.random() > PRIMARY_NAME
    name = rng.choice(subject.aliases) if use_alias else subject.name
    named_style = rng.random() < STYLE_NAMED
    style_first = named_style and rng.random() < 0.2
    words = f"{style} {name}" if style_first else name
    endings = []
    if named_style and not style_first:
        endings.append(rng.choice(STYLE_ENDINGS[style]))
    if rng.random() < COLOR_NAMED:
        endings.append(rng.choice(COLOR_ENDINGS).format(with_article("a", color), color))
    rng.shuffle(endings)
    return rng.choice(OPENINGS) + with_article(rng.choice(ARTICLES), words) + "".join(endings)
