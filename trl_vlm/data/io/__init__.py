"""Reading and writing datasets: sources, resumable output, image files, shards, cards."""
