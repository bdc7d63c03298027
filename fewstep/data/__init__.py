"""Prompts, images and latents, and the micro-batches made of them."""
