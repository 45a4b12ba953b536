"""The commands of the command line: what each takes stands in `parsers`, what carries it out in a file of its name."""
