"""The annotators that Fanlight ships, as data: `annotators.json`, which `make catalog` writes from the registry.

What ships means the same whatever a worker says of it. No network library is needed to read this.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType

from fanlight.contract.parameters import Parameter

FILE = Path(__file__).with_name("annotators.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShippedAnnotator:
    """`version`: raised by hand where the same input may give other bytes, with the digest of its pinned weights."""

    id: str
    version: str
    description: str = ""
    parameters: tuple[Parameter, ...] = ()
    deterministic: bool = True
    weight_bytes: int = 0
    controlnets: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    license: str = ""

    def takes(self, parameters: Sequence[Parameter]) -> bool:
        """Whether these are its parameters; their descriptions may differ."""
        return _bare(parameters) == _bare(self.parameters)


def _bare(parameters: Sequence[Parameter]) -> dict[str, tuple[Parameter, type]]:
    """By name. With the kind: 1, 1.0 and true are equal."""
    return {each.name: (replace(each, description=""), type(each.default)) for each in parameters}


@cache
def shipped_annotators() -> Mapping[str, ShippedAnnotator]:
    """By id."""
    read = [_read(each) for each in json.loads(FILE.read_text(encoding="utf-8"))]
    return MappingProxyType({each.id: each for each in read})


def _read(value: dict[str, object]) -> ShippedAnnotator:
    lists = {name: tuple(each) for name, each in value.items() if isinstance(each, list) and name != "parameters"}
    parameters = value["parameters"]
    assert isinstance(parameters, list)
    described = tuple(Parameter(**each | {"choices": tuple(each.get("choices", ()))}) for each in parameters)
    return ShippedAnnotator(**value | lists | {"parameters": described})  # type: ignore[arg-type]


def written(annotators: Sequence[ShippedAnnotator]) -> str:
    """The file's text; values that say nothing are left out of the parameters."""
    values = [asdict(each) for each in annotators]
    for value in values:
        value["parameters"] = [
            {name: given for name, given in each.items() if given not in (None, "", ()) or name == "default"}
            for each in value["parameters"]
        ]
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"
