"""What the gateway does, in domain words. Knows the ports and no transport."""
