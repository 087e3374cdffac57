"""Adapter: everything that PEFT calls, from the config to the file."""
