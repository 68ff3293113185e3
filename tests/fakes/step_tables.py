"""Schedulers without step tables, as those that clip are."""

import pytest

from services.diffusion.engine import sampler


def without_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every scheduler takes its steps itself."""
    monkeypatch.setattr(sampler, "_TABLES", sampler._Tables())
    monkeypatch.setattr(sampler, "_new_table", lambda *_: None)
