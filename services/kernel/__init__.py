"""What every service stands on: errors, settings, logs, gRPC, digests. Knows no other room, no torch, no numpy."""
