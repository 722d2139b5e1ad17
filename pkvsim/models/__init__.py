"""Models: what a transformer reads and computes per token, from presets and from Hugging Face configs."""
