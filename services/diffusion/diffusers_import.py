"""Imports diffusers' own files as the package `diffusers_lean`, without the other packages that they import.

`import diffusers` takes four times as long as torch: transformers, accelerate, peft, the hub's client, and
torch._dynamo with sympy for a decorator. Models, schedulers and conversions need none of it. `diffusers` itself is not
changed.
"""

import ast
import builtins
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.metadata import version
from importlib.util import find_spec, spec_from_file_location, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

from packaging.version import Version

ROOT = "diffusers_lean"
# Packages that diffusers' modules import for what is not done here: the hub, downloads, pipelines.
_STUBBED_PACKAGES = ("accelerate", "huggingface_hub", "peft", "requests", "scipy", "tqdm", "transformers", "yaml")
# Imported for a decorator that only torch.compile needs; diffusers works without it.
_REFUSED = "torch._dynamo"
_COMPARISONS: Mapping[str, Callable[[Version, Version], bool]] = {
    "<": lambda one, other: one < other,
    "<=": lambda one, other: one <= other,
    "==": lambda one, other: one == other,
    "!=": lambda one, other: one != other,
    ">=": lambda one, other: one >= other,
    ">": lambda one, other: one > other,
}


def import_diffusers_module(name: str) -> Any:
    """`name`: as below `diffusers`, such as `models.unets.unet_2d_condition`."""
    _install()
    return importlib.import_module(f"{ROOT}.{name}")


@cache
def _install() -> None:
    spec = find_spec("diffusers")
    assert spec is not None
    assert spec.submodule_search_locations
    sys.meta_path.insert(0, _Finder(Path(spec.submodule_search_locations[0])))


class _Finder(MetaPathFinder):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        root, _, below = name.partition(".")
        if root != ROOT:
            return None
        place = self._folder.joinpath(*below.split("."))
        if below in _STAND_INS:
            return spec_from_loader(name, _StandIn(_STAND_INS[below]))
        if place.is_dir():
            return spec_from_loader(name, _PackageLoader(place), is_package=True)
        file = place.with_suffix(".py")
        return spec_from_file_location(name, file, loader=_FileLoader(name, str(file))) if file.is_file() else None


class _FileLoader(SourceFileLoader):
    """Runs the file with an `import` of its own, so that other imports are not changed."""

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _import}
        super().exec_module(module)


def _import(
    name: str,
    scope: Mapping[str, object] | None = None,
    local: Mapping[str, object] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> ModuleType:
    top = name.partition(".")[0]
    if level == 0 and name == _REFUSED:
        raise ModuleNotFoundError(f"{name} is not imported here", name=name)
    if level == 0 and top in _STUBBED_PACKAGES:
        return _module(name, {each: _stub(each) for each in fromlist}) if fromlist else _LazyModule(top)
    return builtins.__import__(name, scope, local, fromlist or (), level)


class _LazyModule(ModuleType):
    """A module that is imported when a name of it is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(self.__name__), name, None) or importlib.import_module(
            f"{self.__name__}.{name}"
        )


class _PackageLoader(Loader):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Package(spec.name, self._folder)

    def exec_module(self, module: ModuleType) -> None:
        module.__path__ = [str(self._folder)]


class _Package(ModuleType):
    """Its `__init__` is read and not run: what that imports from below is imported when it is used."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name)
        self._init = folder / "__init__.py"
        self._sources: Mapping[str, str] | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":
            raise AttributeError(name)
        found = self._resolve(name)
        setattr(self, name, found)
        return found

    def _resolve(self, name: str) -> Any:
        if self.__name__ == ROOT:
            # Its thousand classes are looked up only to warn of configs of other classes.
            if name == "__version__":
                return version("diffusers")
            raise AttributeError(name)
        if name in _STUBBED_NAMES:
            return _stub(name)
        if self._sources is None:
            self._sources = _sources(self._init)
        if name not in self._sources:
            raise AttributeError(f"{self.__name__} has no {name}")
        return getattr(importlib.import_module(f"{self.__name__}.{self._sources[name]}"), name)


def _sources(init: Path) -> Mapping[str, str]:
    """By name, the module below the package from which its `__init__` imports it."""
    tree = ast.parse(init.read_bytes())
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return {
        each.asname or each.name: statement.module
        for statement in statements
        if statement.module
        for each in statement.names
    }


class _StandIn(Loader):
    def __init__(self, names: Callable[[str], Any]) -> None:
        self._names = names

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _module(spec.name, {"__getattr__": self._named})

    def _named(self, name: str) -> Any:
        """No `__file__`: `inspect` reads it of every module, and would take any value for a path."""
        if name.startswith("__"):
            raise AttributeError(name)
        return self._names(name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def _module(name: str, content: Mapping[str, Any]) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(content)
    return module


def _stub(name: str) -> Any:
    """A class, decorator or name that does nothing."""
    if name.startswith("__"):
        raise AttributeError(name)
    if name.isupper():
        return ""
    if name[0].isupper():
        return type(name, (), {})
    if name in _DECORATORS:
        return lambda decorated: decorated

    def absent(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"diffusers' {name} is not there: models are loaded by services.diffusion.models")

    return absent


def _availability(name: str) -> Any:
    """diffusers' `is_..._available`, whose own versions search all installed packages."""
    if name == "is_torch_version":
        return _is_torch_version
    if name.startswith("is_"):
        there = name == "is_torch_available" or (name == "is_scipy_available" and find_spec("scipy") is not None)
        return lambda *_: there
    return _stub(name)


def _is_torch_version(comparison: str, other: str) -> bool:
    return _COMPARISONS[comparison](Version(Version(version("torch")).base_version), Version(other))


def _offloading(name: str) -> Any:
    """diffusers looks up models' offloading hooks; there are none here."""

    def no_hook(*_: Any) -> Any:
        raise ValueError("nothing is offloaded by hooks")

    return no_hook if name == "_get_group_onload_device" else lambda *_: False


def _remapping(name: str) -> Any:
    """Only image transformers' classes are remapped; there are none here."""
    return (lambda config, cls: cls) if name == "_fetch_remapped_cls_from_config" else _stub(name)


_DECORATORS = ("apply_forward_hook", "validate_hf_hub_args")
# Adapters and files are read into models by services.diffusion.models, and nothing is quantized here.
_STUBBED_NAMES = ("DiffusersAutoQuantizer", "DiffusersQuantizer", "PeftAdapterMixin", "UNet2DConditionLoadersMixin")
# By module, what makes the values of its names.
_STAND_INS: Mapping[str, Callable[[str], Any]] = {
    "dependency_versions_check": _stub,
    "hooks.group_offloading": _offloading,
    "image_processor": _stub,
    "loaders.single_file_model": _stub,
    "models.model_loading_utils": _remapping,
    "quantizers.quantization_config": _stub,
    "utils.accelerate_utils": _stub,
    "utils.hub_utils": _stub,
    "utils.import_utils": _availability,
}
