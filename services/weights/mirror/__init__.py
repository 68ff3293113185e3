"""Mirrors: the packed form of weights, publishing to a mirror, reading mirrors' catalogs."""
