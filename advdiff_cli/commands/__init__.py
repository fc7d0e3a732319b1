"""One module for each subcommand: parse, call the library, print."""
