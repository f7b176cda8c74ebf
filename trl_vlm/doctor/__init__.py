"""`trl-vlm doctor`: what there is to train with, and whether a user's own model behaves as the trainers assume."""
