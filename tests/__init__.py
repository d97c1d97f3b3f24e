"""Tests of every floor: one file a module, names that are sentences."""
