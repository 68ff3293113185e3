"""The content-addressed store of a node: objects, their index, LRU eviction, single flight of downloads."""
