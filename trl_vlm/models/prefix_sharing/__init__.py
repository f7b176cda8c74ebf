"""One pass through prompt and image for all replies to it."""
