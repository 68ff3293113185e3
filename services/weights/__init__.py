"""Model weights: resolved, planned, downloaded, stored and loaded. See docs/walk.md."""
