"""Linen modules with logical axes."""
