"""Networks behind annotators, one file a family. Each imports its libraries when it is built, never before."""
