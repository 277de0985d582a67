"""Denoisers of unmask: noise processes, objectives, samplers, the training loop."""
