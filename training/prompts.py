"""The prompts that evaluation uses. Knows words and scenes, no images and no models."""

from dataclasses import dataclass
from random import Random

from training.captions import plain_prompt
from training.scenes import COLORS, Framing, Scene, random_scene, rows_by_emoji
from training.vocabulary import STYLES, load_subjects

SUBJECTS = load_subjects()
HELD_IN = 64
# What a newcomer types, and the subjects that count as right.
SHORT_PROMPTS = [
    ("a cat", {"cat"}),
    ("the sun", {"sun"}),
    ("a cup of coffee", {"cup of coffee"}),
    ("my car", {"car"}),
    ("a dog", {"dog"}),
    ("the moon", {"moon"}),
    ("an apple", {"red apple", "green apple"}),
    ("a rocket", {"rocket"}),
    ("a tree", {"tree"}),
    ("my house", {"house"}),
    ("pizza", {"pizza"}),
    ("a fish", {"fish"}),
    ("a heart", {"heart"}),
    ("the robot", {"robot"}),
    ("one star", {"star"}),
    ("a birthday cake", {"birthday cake"}),
    ("an ice cream", {"ice cream"}),
    ("a present", {"gift"}),
    ("a boat", {"sailboat"}),
    ("a happy face", {"smiley"}),
    ("my teddy bear", {"teddy bear"}),
    ("a rose", {"rose"}),
    ("the pumpkin", {"pumpkin"}),
    ("an airplane", {"airplane"}),
]


@dataclass(frozen=True, slots=True)
class EvaluationPrompt:
    """A prompt that names everything; `subject` is an index into the vocabulary."""

    subject: int
    style: str
    color: str

    @property
    def text(self) -> str:
        return plain_prompt(SUBJECTS[self.subject].name, self.style, self.color)

    @property
    def label(self) -> str:
        return f"{self.style} {SUBJECTS[self.subject].name}"

    def scene(self, rng: Random, framing: Framing) -> Scene:
        """A true image of the prompt, framed as in training."""
        row = rows_by_emoji()[SUBJECTS[self.subject].emoji]
        drawn = random_scene(rng, [row], (self.style,), framing)
        return Scene(
            row=row,
            style=self.style,
            color=self.color,
            background=COLORS[self.color],
            scale=drawn.scale,
            dx=drawn.dx,
            dy=drawn.dy,
            flip=drawn.flip,
        )


def _shuffled() -> tuple[list[int], Random]:
    rng = Random(5)
    return rng.sample(range(len(SUBJECTS)), len(SUBJECTS)), rng


def _prompts(subjects: list[int], rng: Random) -> list[EvaluationPrompt]:
    colors = list(COLORS)
    return [EvaluationPrompt(subject, STYLES[index % 2], rng.choice(colors)) for index, subject in enumerate(subjects)]


def held_in_prompts() -> list[EvaluationPrompt]:
    """64 subjects in turn in both styles, each on a random color."""
    order, rng = _shuffled()
    return _prompts(order[:HELD_IN], rng)


def every_other_subject() -> list[EvaluationPrompt]:
    """The subjects that `held_in_prompts` leaves out."""
    order, _ = _shuffled()
    return _prompts(order[HELD_IN:], Random(6))
