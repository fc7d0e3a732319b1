"""One thin module per subcommand: parse, load, call, write, report."""
