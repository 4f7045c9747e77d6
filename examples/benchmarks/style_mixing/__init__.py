"""Style LoRAs of a small Flux, their mixes by every way, and what a judge sees in the pictures."""
