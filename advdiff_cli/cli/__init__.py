"""What commands share on the command line: option groups and output tables."""
