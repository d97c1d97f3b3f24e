"""Checkpoint -> bundle of float ONNX subgraphs."""
