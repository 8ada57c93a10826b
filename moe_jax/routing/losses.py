"""Auxiliary losses of routers: unweighted float32 scalars over the valid tokens of the call, on all devices together."""

import jax
import jax.numpy as jnp


def balance_loss(probabilities: jax.Array, counts: jax.Array, valid: jax.Array) -> jax.Array:
    """N * sum_e f_e P_e, the Switch form: 1 when even, N when all go to one expert.

    arXiv 2101.03961, equations 4 to 6. Over the whole call, which is a microbatch; see `sequence_balance_loss`.

    Args:
      probabilities: [T, N], of the N = E + V experts.
      counts: [N] assignments before any is dropped; f is their share, so that even is 1 for every K. No
        gradient.
      valid: bool [T].
    """
    mean = jnp.sum(jnp.where(valid[:, None], probabilities, 0), axis=0) / jnp.maximum(jnp.sum(valid), 1)
    counts = jax.lax.stop_gradient(counts).astype(mean.dtype)
    return probabilities.shape[1] * jnp.sum(counts / jnp.maximum(jnp.sum(counts), 1) * mean)


def sequence_balance_loss(
    probabilities: jax.Array, chosen: jax.Array, valid: jax.Array, sequences: jax.Array | None
) -> jax.Array:
    """The mean of `balance_loss` over sequences, each by itself: stricter, 1 when every sequence is even.

    DeepSeek-V3 (arXiv:2412.19437, equations 17 to 20). A sequence without valid tokens does not count.

    Args:
      probabilities: [T, N].
      chosen: [T, N], 1 where a token chose an expert, else 0. No gradient.
      valid: bool [T].
      sequences: int32 [T], below T; None: one sequence.
    """
    tokens = probabilities.shape[0]
    sequences = jnp.zeros(tokens, jnp.int32) if sequences is None else sequences
    sequences = jnp.where(valid, sequences, tokens)

    def total(values):  # dropped where not valid
        return jax.ops.segment_sum(jnp.where(valid[:, None], values, 0), sequences, tokens)

    share = total(jax.lax.stop_gradient(chosen).astype(probabilities.dtype))
    share = share / jnp.maximum(jnp.sum(share, axis=1, keepdims=True), 1)
    lengths = total(jnp.ones((tokens, 1), probabilities.dtype))
    terms = probabilities.shape[1] * jnp.sum(share * total(probabilities) / jnp.maximum(lengths, 1), axis=1)
    return jnp.sum(terms) / jnp.maximum(jnp.sum(lengths > 0), 1)


def excess_loss(gates: jax.Array, counts: jax.Array, expert_ids: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean over valid tokens of (n_e - n) / n times the gate, e the token's expert and n = T / E: 0 when even.

    StableMoE's balance loss (arXiv:2204.08396, equation 8), by token. Tokens of a crowded expert are pushed away from it, those
    of an idle one drawn to it; an expert without a token has no gradient.

    Args:
      gates: [T], sigmoids of the affinities.
      counts: [E] tokens of each expert. No gradient.
      expert_ids: int32 [T], below E.
      valid: bool [T].
    """
    counts = jax.lax.stop_gradient(counts).astype(gates.dtype)
    even = jnp.maximum(jnp.sum(counts), 1) / counts.size
    excess = ((counts - even) / even)[expert_ids]
    return jnp.sum(jnp.where(valid, excess * gates, 0)) / jnp.maximum(jnp.sum(valid), 1)


def entropy_loss(probabilities: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean over valid tokens of the entropy of probabilities [T, N], nats (arXiv:2403.07652, equation 6)."""
    nats = -jnp.sum(probabilities * jnp.log(jnp.maximum(probabilities, jnp.finfo(probabilities.dtype).tiny)), axis=-1)
    return jnp.sum(jnp.where(valid, nats, 0)) / jnp.maximum(jnp.sum(valid), 1)


def token_nats(logits: jax.Array, targets: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean over valid tokens of the cross-entropy of logits [T, N] with targets int [T], nats."""
    nats = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return jnp.sum(jnp.where(valid, nats, 0)) / jnp.maximum(jnp.sum(valid), 1)


def z_loss(logits: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean over valid tokens of logsumexp(logits [T, N])^2 (ST-MoE, arXiv 2202.08906, equation 5)."""
    # Masked before the square: padding may hold anything, and 0 * inf would not be 0.
    z = jax.nn.logsumexp(jnp.where(valid[:, None], logits, 0), axis=-1)
    return jnp.sum(jnp.where(valid, z, 0) ** 2) / jnp.maximum(jnp.sum(valid), 1)
