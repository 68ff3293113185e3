"""Which models lie on this machine, and how they come into memory. Knows no requests and no gRPC."""
