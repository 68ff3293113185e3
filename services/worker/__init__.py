"""The lease loop that all stages share. Knows the queue's protos and no stage."""
