"""The exam for authors of plugins."""
