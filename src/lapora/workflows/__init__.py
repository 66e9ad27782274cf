"""What the commands do: settings in, results out; the only place where model and tasks meet."""
