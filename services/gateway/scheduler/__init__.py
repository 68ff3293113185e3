"""Which waiting task a worker should do now. Pure, so that a simulator can drive the very same code."""
