"""A library: a basis directory of many adapters, each a small core between factors that its cluster shares."""
