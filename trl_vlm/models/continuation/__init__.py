"""Many continuations of one prompt and reply, with images partly hidden."""
