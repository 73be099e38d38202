"""The command line: flags, parsing, signals and one-line errors. For scripts; imports nothing heavy."""
