"""The posterior: Gaussian blocks in their eigenbasis, the evidence, and the files they live in."""
