"""The lease loop that every stage shares. Knows the queue's protos and no stage."""
