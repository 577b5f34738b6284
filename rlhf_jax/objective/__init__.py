"""What is optimised: pure functions of arrays."""
