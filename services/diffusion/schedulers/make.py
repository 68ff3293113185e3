"""Schedulers from their names and a checkpoint's config. A scheduler keeps state: one picture, one scheduler."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from services.diffusion.schedulers.names import SCHEDULERS


def base_config(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the checkpoint's own scheduler, with its class's defaults filled in where the class is known."""
    known = SCHEDULERS.get(saved.get("_class_name", ""))
    if known is None:
        return saved
    config: Mapping[str, Any] = _class(known.module, known.cls).from_config(dict(saved)).config
    return config


def make_scheduler(name: str, config: Mapping[str, Any], *, steps: int, device: Any) -> Any:
    """A fresh scheduler, set to so many steps; its prediction type and noise are the checkpoint's."""
    known = SCHEDULERS[name]
    scheduler = _class(known.module, known.cls).from_config(config, **known.options)
    scheduler.set_timesteps(steps, device=device)
    return scheduler


def _class(module: str, cls: str) -> Any:
    return getattr(import_module(module), cls)
