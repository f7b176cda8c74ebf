"""BDHS: rejected replies that a model writes itself, while it sees almost nothing of the image."""
