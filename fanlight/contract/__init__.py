"""What a request may say: every limit, default, alias and grammar, once, for client, gateway and workers.

Imports protobuf and the standard library alone, no gRPC. Knows no worker: what depends on one is a need (`needs`).
"""
