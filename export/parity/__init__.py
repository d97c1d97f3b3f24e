"""Stages of a bundle against recorded activations of the official code."""
