"""The command line: `edsc --help`."""
