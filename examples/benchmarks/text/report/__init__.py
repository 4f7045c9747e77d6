"""RESULTS.md and its figures, made of the answers alone."""
