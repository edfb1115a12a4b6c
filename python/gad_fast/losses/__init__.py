"""Losses and advantages: pure functions over tensors, which know no model and no data."""
