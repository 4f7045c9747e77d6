"""Dense references in float64."""
