"""Reward models that see the images and read the facts."""
