"""Stage 2: a byte-level BPE with CLIP's conventions, learned from the captions. Knows no models."""

import json
from random import Random

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from training.captions import caption
from training.parallel import OUT
from training.vocabulary import STYLES, load_colors, load_subjects

FOLDER = OUT / "tokenizer"
VOCABULARY_SIZE = 1400
CAPTIONS_PER_SUBJECT = 48
Pair = tuple[str, str]
START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
OTHER_WORDS = (
    "photo image drawing of the and with in at by an high quality best masterpiece low blurry ugly sketch "
    "line art watercolor left right big large huge small tiny two three dark light bright simple cute toy "
    "lavender mint"
)


def corpus() -> list[str]:
    """Captions of every subject, and words that prompts often carry, so that each is few tokens."""
    rng = Random(0)
    colors = list(load_colors())
    made = [
        caption(subject, rng.choice(STYLES), rng.choice(colors), rng)
        for subject in load_subjects()
        for _ in range(CAPTIONS_PER_SUBJECT)
    ]
    return made + [OTHER_WORDS] * 20


def learn_merges(alphabet: list[str]) -> list[Pair]:
    """The BPE merges, most frequent first."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        initial_alphabet=alphabet,
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def clip_vocabulary(alphabet: list[str], merges: list[Pair]) -> tuple[list[str], list[Pair]]:
    """Tokens in CLIP's order: bytes, bytes at a word's end, merges, start, end. And the merges among them."""
    tokens = dict.fromkeys([*alphabet, *(byte + WORD_END for byte in alphabet)])
    kept = []
    for left, right in merges:
        if left in tokens and right in tokens and left + right not in tokens:
            tokens[left + right] = None
            kept.append((left, right))
    return [*tokens, START, END], kept


def build() -> CLIPTokenizer:
    """Learn the tokenizer and write vocab.json, merges.txt and what transformers adds."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens, merges = clip_vocabulary(alphabet, learn_merges(alphabet))
    FOLDER.mkdir(parents=True, exist_ok=True)
    vocab_file, merges_file = FOLDER / "vocab.json", FOLDER / "merges.txt"
    numbered = {token: index for index, token in enumerate(tokens)}
    vocab_file.write_text(json.dumps(numbered, ensure_ascii=False))
    merges_file.write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
    tokenizer = CLIPTokenizer(vocab=str(vocab_file), merges=str(merges_file), model_max_length=77, pad_token=END)
    tokenizer.save_pretrained(FOLDER)
    return CLIPTokenizer.from_pretrained(FOLDER)


def main() -> None:
    """Command line."""
    tokenizer = build()
    sample = "my 3d cup of coffee on an orange background"
    print(f"{len(tokenizer)} tokens; {sample!r} = {tokenizer.tokenize(sample)}")


if __name__ == "__main__":
    main()
