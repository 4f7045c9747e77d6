"""The constants of the error bounds, measured on models and data."""
