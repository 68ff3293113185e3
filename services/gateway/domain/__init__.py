"""What a job is and how it changes. Pure: no clock, no lock, no store, no await, no protobuf."""
