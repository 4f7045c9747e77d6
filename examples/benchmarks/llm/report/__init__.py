"""RESULTS-LLM.md: tables and figures of what was answered, and nothing else."""
