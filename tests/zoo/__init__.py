"""Small models, adapters, files and devices."""
