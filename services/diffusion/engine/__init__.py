"""Generates many images at once on one device. Knows no gRPC and no protobuf."""
