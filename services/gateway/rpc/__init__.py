"""The gateway's gRPC services: translate, call, translate, return."""
