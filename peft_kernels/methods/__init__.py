"""PEFT methods: each one's config and how it rewrites a model."""
