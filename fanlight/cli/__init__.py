"""The command line. Nothing here imports gRPC before a command needs it, so that help is quick."""
