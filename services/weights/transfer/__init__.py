"""Bytes over the network onto the disk: ranged parallel downloads with retry, back-off, resume and digests."""
