"""REINFORCE leave-one-out of vision-language models."""
