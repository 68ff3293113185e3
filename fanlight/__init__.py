"""What other people import: generated stubs, the client and the command line. No server code."""

__version__ = "0.1.0"
