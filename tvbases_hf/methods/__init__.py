"""Merging methods: K changes of one weight, and a weight for each, become one change."""
