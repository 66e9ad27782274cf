"""Tasks: how a row of data becomes a prompt, the answers to choose from, and the right one."""
