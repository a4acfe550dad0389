"""Models beyond the release's, each in a file: what the paper does not have."""
