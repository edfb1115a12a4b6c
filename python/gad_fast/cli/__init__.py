"""The command line: a file a command; each parses its words and calls the library."""
