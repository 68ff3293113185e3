"""The annotators, one file a family. Each takes pixels and gives pixels; none knows a request, a size or a thread."""
