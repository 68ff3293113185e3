"""How pictures are painted, beyond prompt, size and steps: values that the gateway checks and hands on. Pure."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

# The id under which a worker offers to fetch whatever a reference names.
ANY = "*"
# `<lora:name:weight>` in a prompt; the worker reads it in full.
_LORA = re.compile(r"(?<!\\)<(?:lora|lyco):([^:<>]+)[:>]")

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraUse:
    model: str
    weight: float | None = None
    text_encoder_weight: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PaintOptions:
    """As a client gave them; what is None or empty is the worker's choice. Names are those of the contract."""

    strength: float | None = None
    resize: str = ""
    guess_mode: bool = False
    loras: tuple[LoraUse, ...] = ()
    vae: str = ""
    embeddings: tuple[str, ...] = ()
    clip_skip: int | None = None
    noise_schedule: str = ""
    eta: float | None = None
    format: str = ""
    quality: int | None = None
    safety_checker: str = ""
    strict: bool = False

    @property
    def needs(self) -> frozenset[str]:
        """What a worker must offer for them."""
        return frozenset(
            [need("lora", each.model) for each in self.loras]
            + [need("embedding", each) for each in self.embeddings]
            + ([need("vae", self.vae)] if self.vae else [])
        )


def need(kind: str, name: str) -> str:
    """What a worker must offer for a model: the model, or that it fetches any reference of the kind."""
    return f"{kind}:{ANY if is_reference(name) else name}"


def is_reference(name: str) -> bool:
    """Says where the model comes from, such as `hf:org/repo`; ids have neither colon nor slash."""
    return ":" in name or "/" in name


def loras_in(prompt: str) -> list[str]:
    """The LoRAs that a prompt names, in order."""
    return [name.strip() for name in _LORA.findall(prompt)]


def with_loras_renamed(prompt: str, rename: Callable[[str], str]) -> str:
    """The prompt with each LoRA called as `rename` says."""

    def renamed(tag: re.Match[str]) -> str:
        start, end = tag.start(1) - tag.start(), tag.end(1) - tag.start()
        return tag[0][:start] + rename(tag[1].strip()) + tag[0][end:]

    return _LORA.sub(renamed, prompt)


def words_in(text: str, names: Iterable[str]) -> list[str]:
    """Those of the names that stand in the text as whole words, in any case, as embeddings do in prompts."""
    words = frozenset(_WORD.findall(text.lower()))
    perhaps = (name for name in names if words.issuperset(_WORD.findall(name.lower())))
    return [name for name in perhaps if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE)]
