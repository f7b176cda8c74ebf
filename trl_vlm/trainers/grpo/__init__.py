"""Group-relative policy optimization of vision-language models."""
