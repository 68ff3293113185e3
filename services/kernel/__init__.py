"""What every service is built on: errors on the wire, settings, logs, gRPC, images.

Knows no other room, no torch, no numpy.
"""

# Before gRPC is imported: see fanlight/__init__.py.
import fanlight as fanlight
