"""What stands behind the ports: stores and blobs, named after what they keep things in."""
