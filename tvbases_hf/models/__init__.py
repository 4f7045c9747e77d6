"""What T models are: named changes over one base, read one tensor at a time, and their inner products."""
