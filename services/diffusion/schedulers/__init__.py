"""Schedulers by name, made fresh for every picture."""
