"""What each denoiser minimises, and what its network learns about the order."""
