"""The options of layers that retrieve experts of one neuron each."""

import dataclasses
import math

from moe_jax.config.leaf import field


@dataclasses.dataclass
class PeerConfig:
    """A feed-forward layer of kind peer (one-neuron experts, arXiv:2407.04153) or pkm (values, arXiv:1907.05242)."""

    experts: int = field(2**20, "Experts N in the pool, a square.", low=1, high=2**30)
    heads: int = field(8, "Heads H, each with a query of its own.", low=1)
    top_k: int = field(16, "Experts K that each head retrieves.", low=1, role="scoring")
    selector: str = field(
        "product_keys",
        "What chooses a token's experts: queries against product keys, or a random table of token ids, which learns nothing. "
        "The second is a control: if it does as well, the first chooses badly.",
        choices=("product_keys", "token_hash"),
    )
    key_width: int = field(256, "Width of a query and of a pair of keys; even.", low=2)
    query_rank: int = field(
        0, "Width of one query that all heads share, each with keys of its own; even; 0: each has a query of key_width.", low=0
    )
    share_keys: bool = field(True, "All heads search the same keys; off: each head its own.")
    query_norm: str = field(
        "batchnorm",
        "Of the queries: over the real tokens of a batch, over each query, or none.",
        choices=("batchnorm", "layernorm", "none"),
    )
    score: str = field(
        "softmax",
        "A head's gates, from the scores of its K experts: their softmax, the sigmoid of each, or the scores themselves.",
        choices=("softmax", "sigmoid", "raw"),
        role="scoring",
    )
    gate_scale: float = field(
        1.0, "Multiplies the gates, such as by top_k; output rows start as much smaller.", low=1e-6, role="scoring"
    )
    activation: str = field("gelu", "Of the neurons of kind peer.", choices=("gelu", "gelu_tanh", "relu", "swiglu"))
    shared_width: int = field(0, "Hidden width of a dense network beside them that sees every token; 0: none.", low=0)
    share_pool: bool = field(False, "One pool for all blocks of this kind, each with a router of its own.")
    row_gradients: bool = field(
        True, "Gradients and updates of the pool by rows: time and memory follow what is retrieved, not N."
    )
    split: str = field(
        "width",
        "What mesh.expert splits: the pool's width D, even for any usage, or its experts.",
        choices=("width", "experts"),
        role="rounding",
    )
    backend: str = field(
        "auto",
        "What fetches and sums the experts; auto: the best of the platform and of the pool's size; dense: products with all "
        "experts, for small pools. The kernels triton (NVIDIA) and mosaic (TPU) are interpreted elsewhere, slowly.",
        choices=("auto", "blocks", "dense", "triton", "mosaic"),
        role="rounding",
    )

    @property
    def searches(self) -> bool:
        """Whether queries search keys; else a table of token ids chooses, without parameters."""
        return self.selector == "product_keys"

    def selector_products(self, width: int) -> int:
        """Multiply-adds that choose a token's experts where D = `width`: the queries, and their halves against sqrt(N) keys."""
        if not self.searches:
            return 0
        n = math.isqrt(self.experts)
        if self.query_rank:
            return self.query_rank * (width + self.heads * n)
        return self.heads * self.key_width * (width + n)
