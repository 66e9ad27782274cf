"""The command line: options parsed, one workflow called, its result printed. No torch is imported here."""
