"""What every service is built on: errors on the wire, settings, logs, gRPC, images.

Knows no other room, no torch, no numpy.
"""
