"""Rules that several sections share."""

import math

from moe_jax.config.leaf import ConfigError


def must_divide(field: str, value: int, total_field: str, total: int) -> None:
    """Refuses a `value` that leaves a rest of `total`."""
    if total % value:
        limit = f"does not divide {total_field}={total}"
        raise ConfigError(field, value, limit, f"change one so that {total_field} is a multiple of {field}")


def check_exchange_buffer(field: str, value: float) -> None:
    """Refuses a buffer that no routing can do with."""
    if 0 < value < 1:
        limit = "less than an even load needs, so that every call would take gather"
        raise ConfigError(field, value, limit, "use 1 or more, or 0 for a buffer that holds everything")


def check_product_keys(
    path: str, experts: int, top_k: int, key_width: int, share_keys: bool = False, query_rank: int = 0
) -> None:
    """Refuses sizes that product keys cannot search. path: what stands before the fields' names."""
    side = math.isqrt(experts)
    if side * side != experts:
        near = f"use {side**2} or {(side + 1) ** 2}"
        raise ConfigError(path + "experts", experts, "not a square, which two sets of keys need", near)
    if top_k > side:
        limit = f"more than the {side} keys of a half, the root of {path}experts={experts}"
        raise ConfigError(path + "top_k", top_k, limit, f"use {side} or less, or more experts")
    if key_width % 2:
        limit = "odd, but each half of a query meets keys of its own"
        raise ConfigError(path + "key_width", key_width, limit, f"use {key_width + 1}")
    if query_rank % 2:
        limit = "odd, but each half of the query meets keys of its own"
        raise ConfigError(path + "query_rank", query_rank, limit, f"use {query_rank + 1}")
    if query_rank and share_keys:
        limit = f"with one query for all heads, {path}query_rank={query_rank}, all would choose the same experts"
        raise ConfigError(path + "share_keys", True, limit, f"use false, or {path}query_rank=0")
