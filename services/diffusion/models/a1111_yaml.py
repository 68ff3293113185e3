"""A1111's `NAME.yaml` beside a checkpoint: what the original implementation's config says of prediction and noise.

Untrusted: read as plain strings, without tags and aliases, to a limited size and depth. Loads no torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.diffusion.models.recipes import UnfitFolder
from services.kernel.files import StrangeFile, read_limited

# Those of Stability AI have 2 to 6 KiB.
YAML_LIMIT_BYTES = 64 * 1024
DEPTH_LIMIT = 40
EPSILON, VELOCITY, SAMPLE = "epsilon", "v_prediction", "sample"
# LDM's `parameterization`.
_PARAMETERIZATIONS = {"eps": EPSILON, "epsilon": EPSILON, "v": VELOCITY, "v_prediction": VELOCITY, "x0": SAMPLE}
# sgm's classes in `scaling_config`.
_SCALINGS = {"EpsScaling": EPSILON, "VScaling": VELOCITY}
_EDM_SCALINGS = frozenset({"EDMScaling", "VScalingWithEDMcNoise"})
_ZERO_SNR_KEYS = frozenset({"ztsnr", "zero_snr", "zero_terminal_snr", "rescale_betas_zero_snr", "zsnr"})
# Keys that only a model's config has.
_CONFIG_KEYS = ("parameterization", "scaling_config.target", "linear_start", "linear_end")
_TRUE = frozenset({"true", "yes", "on", "1"})


@dataclass(frozen=True, slots=True, kw_only=True)
class YamlConfig:
    """`prediction_type`: what LDM takes by default where the file does not say it."""

    prediction_type: str = EPSILON
    has_zero_snr: bool = False
    # Its noise is a continuous one, of a range that the file's own marks have to tell.
    is_edm: bool = False
    # The width of the prompt embeddings of the model that it is for; 0 where it does not say it.
    cross_attention_dim: int = 0
    # Of the noise schedule, as far as they are told.
    betas: Mapping[str, float] = field(default_factory=dict)


def read_yaml(file: Path) -> YamlConfig | None:
    """None where there is no such file, or one that is no model's config.

    UnfitFolder for one that cannot be read or says what nothing can do.
    """
    if not file.is_file():
        return None
    try:
        content = _load(read_limited(file, YAML_LIMIT_BYTES))
    except (OSError, StrangeFile) as error:
        raise UnfitFolder(f"{file.name} beside it cannot be read: {error}; mend or remove it") from error
    except (ValueError, RecursionError) as error:
        raise UnfitFolder(f"{file.name} beside it cannot be read as YAML; mend or remove it") from error
    values = dict(reversed(list(_values(content))))
    return _config(file.name, values) if _is_config(content, values) else None


def _load(data: bytes) -> Any:
    """Strings, lists and objects. ValueError for anything else: aliases grow without bound."""
    # Few models have such a file, so the import waits for one.
    import yaml

    class PlainLoader(yaml.BaseLoader):  # type: ignore[misc]  # a class that is only known when it is imported
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent) or self.depth > DEPTH_LIMIT:
                raise ValueError("it has aliases, or is nested too deep")
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    try:
        # A loader that builds nothing but strings, lists and objects.
        return yaml.load(data, PlainLoader)
    except yaml.YAMLError as error:
        raise ValueError("it is not YAML") from error


def _is_config(content: Any, values: Mapping[str, str]) -> bool:
    """Other programs write cards, tags and settings as YAML under the same name."""
    model = content.get("model") if isinstance(content, Mapping) else None
    is_whole = isinstance(model, Mapping) and bool({"params", "target"} & model.keys())
    return is_whole or any(key in values for key in (*_ZERO_SNR_KEYS, *_CONFIG_KEYS))


def _config(name: str, values: Mapping[str, str]) -> YamlConfig:
    scaling = _last_word(values.get("scaling_config.target", ""))
    parameterization = values.get("parameterization", "").strip().lower()
    if parameterization and parameterization not in _PARAMETERIZATIONS:
        raise UnfitFolder(f"{name} beside it says parameterization {parameterization[:40]!r}, which is not supported")
    if scaling and scaling not in _SCALINGS and scaling not in _EDM_SCALINGS:
        raise UnfitFolder(f"{name} beside it says scaling {scaling[:40]!r}, which is not supported")
    return YamlConfig(
        prediction_type=_PARAMETERIZATIONS.get(parameterization) or _SCALINGS.get(scaling, EPSILON),
        has_zero_snr=any(values.get(key, "").strip().lower() in _TRUE for key in _ZERO_SNR_KEYS),
        is_edm=scaling in _EDM_SCALINGS,
        cross_attention_dim=_whole(values.get("context_dim", "")),
        betas=_betas(values),
    )


def _values(node: Any, parent: str = "") -> Iterator[tuple[str, str]]:
    """All strings by their key, the outermost first; a class's `target` with the key above it."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            text = value[0] if isinstance(value, Sequence) and value and isinstance(value[0], str) else value
            if isinstance(value, str):
                yield (f"{parent}.target" if key == "target" else str(key)), value
            elif key == "context_dim" and isinstance(text, str):
                yield "context_dim", text
        for key, value in node.items():
            yield from _values(value, str(key))
    elif isinstance(node, list):
        for value in node:
            yield from _values(value, parent)


def _last_word(target: str) -> str:
    return target.strip().rpartition(".")[2]


def _whole(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 6 else 0


def _betas(values: Mapping[str, str]) -> Mapping[str, float]:
    """The first and the last of a noise schedule that is not the usual one; empty where they are no such numbers."""
    try:
        start, end = float(values.get("linear_start", "")), float(values.get("linear_end", ""))
    except ValueError:
        return {}
    return {"beta_start": start, "beta_end": end} if 0 < start < end < 1 else {}
