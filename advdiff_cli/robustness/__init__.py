"""The suite of attacks: what it runs, how it is run, the checks of it, and its summary; and sweeps over settings."""
