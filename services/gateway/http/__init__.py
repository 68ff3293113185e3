"""The gateway over HTTP: JSON in the words of the protos. Translates; decides nothing about jobs."""
