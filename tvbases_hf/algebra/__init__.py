"""One weight's change and its decompositions: no files, no models, no threads."""
