"""The lease loop that all stages share. Knows the queue's protos and no stage."""

# Before gRPC is imported: see fanlight/__init__.py.
import fanlight as fanlight
