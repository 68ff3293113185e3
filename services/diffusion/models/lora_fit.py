"""Which layers of an image's LoRAs fit its checkpoint. One rule for layers and for parts: what fits is applied.

What does not is told to whoever asked for the image; a LoRA of which nothing fits is an error.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from services.diffusion.models.entries import LoraEntry, LoraUse
from services.diffusion.models.faults import UnusableModel, part_of
from services.diffusion.models.lora_files import LoraWeights

_NAME_LIMIT = 80


class LoraFit:
    """Collects what is left out of the LoRAs of one image, part by part."""

    def __init__(self, checkpoint_id: str) -> None:
        self._checkpoint_id = checkpoint_id
        self._left_out: dict[LoraEntry, list[str]] = defaultdict(list)

    def add(self, left_out: Mapping[LoraEntry, Sequence[str]]) -> None:
        """Names of layers, of one part."""
        for entry, names in left_out.items():
            self._left_out[entry].extend(dict.fromkeys(names))

    def warnings(self, uses: Sequence[tuple[LoraUse, LoraWeights]], parts: Sequence[str]) -> tuple[str, ...]:
        """A sentence for each LoRA that was applied in part. UnusableModel for one of which nothing was.

        `parts`: those that the checkpoint has; a layer for another one is left out.
        """
        return tuple(filter(None, (self._warning(use, lora, parts) for use, lora in uses)))

    def _warning(self, use: LoraUse, lora: LoraWeights, parts: Sequence[str]) -> str:
        asked = {
            part: layers
            for part, layers in lora.layers.items()
            if (use.unet_weight if part == "unet" else use.text_weight)
        }
        missing = [layer.name for part, layers in asked.items() if part not in parts for layer in layers.values()]
        left_out = [*self._left_out.get(use.entry, ()), *missing]
        total = sum(map(len, asked.values()))
        if not left_out:
            return ""
        if len(left_out) >= total:
            raise UnusableModel(
                f"LoRA {use.entry.id} is of another base than {self._checkpoint_id}: none of its {total} layers fits,"
                f" such as {left_out[0][:_NAME_LIMIT]}",
                field="loras",
            ).of_part(part_of(use.entry))
        return (
            f"LoRA {use.entry.id} was applied without {len(left_out)} of its {total} layers, for which"
            f" {self._checkpoint_id} has no place, such as {left_out[0][:_NAME_LIMIT]}"
        )
