"""What other people import: generated stubs, the client and the command line. No server code."""

import os

# gRPC then asks the system for addresses, as every other program does: hosts files, mDNS, split DNS. Its own resolver
# is fixed when gRPC is imported, which is after this.
os.environ.setdefault("GRPC_DNS_RESOLVER", "native")

__version__ = "0.1.0"
