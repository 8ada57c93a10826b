"""Draws docs/idea.png: a sparse layer as a sparse matrix, tokens x experts.

python docs/idea.py
"""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

TOKENS = ["def", " read", "(", "path", "):", "↵", "    ", "return", " open", "(", "path", ")"]


def draw(axis, gates: np.ndarray, title: str, widths: str) -> None:
    """One matrix [T, E]: a square where a token goes to an expert, darker for a larger gate."""
    tokens, experts = gates.shape
    axis.imshow(np.where(gates > 0, 0.25 + 0.75 * gates, 0), cmap="Blues", vmin=0, vmax=1.15, aspect="auto")
    axis.set_title(title, fontsize=11, loc="left", fontweight="bold")
    axis.set_xlabel(widths, fontsize=9)
    axis.set_xticks(np.arange(-0.5, experts), minor=True)
    axis.set_yticks(np.arange(-0.5, tokens), minor=True)
    axis.grid(which="minor", color="0.85", linewidth=0.6)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.tick_params(which="both", length=0)
    for spine in axis.spines.values():
        spine.set_color("0.6")


def main() -> None:
    """Writes the picture beside this file."""
    rng = np.random.default_rng(3)
    tokens = len(TOKENS)
    dense = np.ones((tokens, 1))
    top2 = np.zeros((tokens, 8))
    for row in top2:
        gate = rng.uniform(0.5, 0.9)
        row[rng.choice(8, 2, replace=False)] = gate, 1 - gate
    top1 = np.where(top2 == top2.max(axis=1, keepdims=True), top2, 0)
    figure, axes = plt.subplots(1, 3, figsize=(8.4, 3.6), width_ratios=[1, 5, 5], layout="constrained")
    draw(axes[0], dense, "dense", "1 expert,\nwidth F")
    draw(axes[1], top1, "top-1 of 8", "8 experts, each of width F")
    draw(axes[2], top2, "top-2 of 8", "8 experts, each of width F")
    axes[0].set_yticks(range(tokens), TOKENS, fontsize=9, family="monospace")
    axes[0].set_ylabel("tokens")
    figure.savefig(pathlib.Path(__file__).with_name("idea.png"), dpi=110)


if __name__ == "__main__":
    main()
