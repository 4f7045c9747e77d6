"""What the benchmarks with real models have in common: questions and answers, the tasks, and tables."""
