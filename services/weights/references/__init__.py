"""What names weights, and what is known of them offline: references, manifests, tensor tables, the catalog."""
