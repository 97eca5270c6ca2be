"""Where packets can go: the rungs of the ladder, and the probe that looks from inside."""
