"""What `config.stage` names: the loop, and who drives it."""
