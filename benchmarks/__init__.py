"""Measurements; results with the hardware that made them lie in results/."""
