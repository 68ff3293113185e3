"""Reads container images and says where their bytes are. Standard library only; knows nothing of Fanlight."""
