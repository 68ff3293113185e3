"""What the gateway does, in terms of the domain. Knows the ports and no transport."""
