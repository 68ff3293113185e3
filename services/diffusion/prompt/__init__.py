"""From a prompt's text to the embeddings that the UNet looks at."""
