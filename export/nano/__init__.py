"""The small checkpoint that we train ourselves: its torch model, its synthetic data, its training stages."""
