"""The command line: parse options, run one workflow, print its result. Imports no torch."""
