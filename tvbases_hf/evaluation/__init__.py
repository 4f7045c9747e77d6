"""Models and data of tasks: evaluated in place, coefficients chosen, tasks forgotten, fine-tunes made."""
