"""The evidence on a language model: merging, compressing and unlearning. See ../bench_llm.py for the command."""
