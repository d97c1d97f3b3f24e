"""Runs a bundle on the device: numpy and ONNX Runtime, never torch."""

import os

# The Linux wheels of ONNX Runtime open a telemetry database and a socket when they are imported, unless told
# before that not to. Nothing leaves this machine, so it is said here, ahead of every import of onnxruntime.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
