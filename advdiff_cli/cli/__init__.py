"""What commands share on the command line: option groups, progress and output tables."""
