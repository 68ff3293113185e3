"""Protobuf to domain and back: the only translation, shared by gRPC and HTTP. Validates once, here."""
