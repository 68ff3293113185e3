"""Annotators that need no torch, one file per family. They take and return pixels; none knows requests or threads."""
