"""Pictures on their way in and out: control images, PNG."""
