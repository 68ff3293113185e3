"""A fleet on a simulated clock: the gateway's own ordering, and simple policies beside it."""
