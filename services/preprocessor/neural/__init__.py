"""Annotators with networks of torch or ONNX, one file per family. A network library is imported on first use only."""
