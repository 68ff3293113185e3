"""From a reference to a plan: which files and tensors are fetched, which are not, and why."""
