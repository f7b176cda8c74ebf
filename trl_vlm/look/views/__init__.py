"""What a page can show: one file per kind of input, each of which makes views of what it read."""
