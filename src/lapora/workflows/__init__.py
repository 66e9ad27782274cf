"""One function per command, from settings to results; the only package that combines models and tasks."""
