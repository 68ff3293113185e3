"""The models on this machine: the catalog of their files, loading, adapters, and their residency in memory.

Knows no requests and no gRPC.
"""
