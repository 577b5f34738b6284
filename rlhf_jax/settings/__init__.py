"""A config, checked and turned into what the steps are compiled with."""
