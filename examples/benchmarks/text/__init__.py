"""The evidence: the papers' tables on a real model and real text tasks. See ../bench_text.py for the command."""
