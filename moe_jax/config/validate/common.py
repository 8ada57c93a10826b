"""Rules that several sections share."""

from moe_jax.config.leaf import ConfigError


def must_divide(field: str, value: int, total_field: str, total: int) -> None:
    """Refuses a `value` that leaves a rest of `total`."""
    if total % value:
        limit = f"does not divide {total_field}={total}"
        raise ConfigError(field, value, limit, f"change one so that {total_field} is a multiple of {field}")
