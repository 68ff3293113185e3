"""From a GenerateRequest to a Generation: the one place where requests are checked. Loads no torch."""
