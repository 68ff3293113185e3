"""PEFT's configuration of a LoRA: in its metadata, as diffusers saves it, or in `adapter_config.json` beside the file.

The rules are PEFT's own (tuners/lora/layer.py, utils/other.py). Loads no torch.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.diffusion.models.lora_names import PARTS
from services.diffusion.models.name_patterns import PatternWork, first_match, read_pattern
from services.diffusion.models.recipes import read_json

METADATA_KEY = "lora_adapter_metadata"
CONFIG_NAME = "adapter_config.json"
# PEFT's file.
PEFT_FILE = "adapter_model.safetensors"
PATTERNS_LIMIT = 4_096
# PEFT's defaults.
DEFAULT_RANK = DEFAULT_ALPHA = 8
# Ways to begin a training that also change the model's own weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class BadPeftConfig(ValueError):
    """A configuration that no training wrote, or that cannot be followed; the message says what is in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftScale:
    """How strong one layer is. `rank`: as configured, for forms whose tensors do not show it."""

    alpha: float
    rank: float
    is_rank_stabilized: bool = False
    # IA3's: the vector scales the layer's inputs, not its outputs.
    is_feedforward: bool = False

    def factor(self, rank: float) -> float:
        """alpha / rank, or alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023). `rank`: above 0."""
        return self.alpha / (math.sqrt(rank) if self.is_rank_stabilized else rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class _PartConfig:
    alpha: float
    rank: float
    is_rank_stabilized: bool
    alphas: Mapping[str, float]
    ranks: Mapping[str, float]
    feedforward: Sequence[str]
    work: PatternWork = field(default_factory=PatternWork)

    def scale(self, module: str) -> PeftScale:
        """`module`: the layer's full name, with dots. BadPattern."""
        alpha, rank = (first_match(each, module, self.work) for each in (self.alphas, self.ranks))
        return PeftScale(
            alpha=self.alpha if alpha is None else alpha,
            rank=self.rank if rank is None else rank,
            is_rank_stabilized=self.is_rank_stabilized,
            is_feedforward=any(f".{module}".endswith(f".{each}") for each in self.feedforward),
        )


def adapter_files(path: Path) -> Mapping[str, Path]:
    """A LoRA's files, by what to put before their tensors' names: of a folder, PEFT's adapter of each part.

    Empty for a folder without any.
    """
    if not path.is_dir():
        return {"": path}
    files = {f"{part}.": path / part / PEFT_FILE for part in PARTS}
    return {head: file for head, file in files.items() if file.is_file()}


# From a part and a layer's name to its scale; None where the file is not PEFT's.
PeftScales = Callable[[str, str], PeftScale | None]


def peft_scales(file: Path, metadata: Mapping[str, str]) -> PeftScales:
    """Of a LoRA's file with this metadata in its header. BadPeftConfig, BadPattern and UnfitFolder."""
    config = _saved(file, metadata)
    parts = {part: _part_config(each) for part in PARTS if (each := _of_part(config, part))}
    return lambda part, module: parts[part].scale(module) if part in parts else None


def _saved(file: Path, metadata: Mapping[str, str]) -> Mapping[str, Any]:
    if saved := metadata.get(METADATA_KEY, ""):
        try:
            config = json.loads(saved)
        except (ValueError, RecursionError) as error:
            raise BadPeftConfig(f"its {METADATA_KEY} is no JSON") from error
        if not isinstance(config, dict):
            raise BadPeftConfig(f"its {METADATA_KEY} is no object")
        return config
    beside = file.with_name(CONFIG_NAME)
    if not beside.is_file() or (file.name != PEFT_FILE and len(list(file.parent.glob("*.safetensors"))) > 1):
        return {}
    return read_json(beside)


def _of_part(config: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """diffusers writes `unet.lora_alpha`; PEFT, which knows no parts, `lora_alpha`."""
    own = {key.removeprefix(f"{part}."): value for key, value in config.items() if key.startswith(f"{part}.")}
    is_flat = not any(key.startswith(tuple(f"{each}." for each in PARTS)) for key in config)
    return config if is_flat else own


def _part_config(config: Mapping[str, Any]) -> _PartConfig:
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise BadPeftConfig(
            f"it was begun with {start[:20]!r}, which changes the model's own weights; save it as a plain LoRA"
        )
    for name in ("use_qalora", "alora_invocation_tokens"):
        if config.get(name):
            raise BadPeftConfig(f"its {name} is set, which is not supported")
    is_rank_stabilized = config.get("use_rslora") or False
    if not isinstance(is_rank_stabilized, bool):
        raise BadPeftConfig("its use_rslora is not true or false")
    alpha = "lora_alpha" if "lora_alpha" in config else "alpha"
    rank = _number(config.get("r", DEFAULT_RANK), "r")
    if rank <= 0:
        raise BadPeftConfig(f"its r is {rank:g}; ranks are above 0")
    return _PartConfig(
        alpha=_number(config.get(alpha, DEFAULT_ALPHA), alpha),
        rank=rank,
        is_rank_stabilized=is_rank_stabilized,
        alphas=_patterns(config, "alpha_pattern"),
        ranks=_patterns(config, "rank_pattern"),
        feedforward=_names(config.get("feedforward_modules")),
    )


def _patterns(config: Mapping[str, Any], name: str) -> Mapping[str, float]:
    given = config.get(name) or {}
    if not isinstance(given, dict):
        raise BadPeftConfig(f"its {name} is no object")
    if len(given) > PATTERNS_LIMIT:
        raise BadPeftConfig(f"its {name} has {len(given)} entries; at most {PATTERNS_LIMIT} are read")
    for pattern in given:
        read_pattern(pattern)
    numbers = {pattern: _number(value, name) for pattern, value in given.items()}
    if name == "rank_pattern" and any(number <= 0 for number in numbers.values()):
        raise BadPeftConfig("its rank_pattern has a rank that is not above 0")
    return numbers


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadPeftConfig(f"its {name} is {str(value)[:40]!r}, which is no number")
    return float(value)


def _names(value: object) -> Sequence[str]:
    """Ends of layers' names."""
    if not isinstance(value, list):
        return ()
    return tuple(each for each in value if isinstance(each, str))[:PATTERNS_LIMIT]
