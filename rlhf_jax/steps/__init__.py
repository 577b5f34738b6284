"""What is compiled: one file per step."""
