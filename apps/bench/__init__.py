"""Measures a bundle on this machine, alone and against other programs."""
