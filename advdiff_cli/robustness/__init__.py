"""The suite of attacks: specification, runner, checks of the attacks, summary; and sweeps over a defense's settings."""
