"""The preprocessor: annotators that turn an image into a control image. docs/annotators.md lists them."""
