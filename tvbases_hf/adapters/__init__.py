"""LoRA and DoRA adapters: read as exact low-rank changes, compressed into one basis, written again."""
