"""What a job is and how it lives. Pure: no clock, no lock, no store, no await, no protobuf."""
