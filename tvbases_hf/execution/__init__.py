"""How work is done: on several threads and processes, with progress, within a plan."""
