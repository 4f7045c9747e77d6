"""What needs a model and data: evaluation in place, learned coefficients, statistics, negation, fine-tuning."""
