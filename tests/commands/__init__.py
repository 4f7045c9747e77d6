"""Commands run in this process, killed, or as several processes."""
