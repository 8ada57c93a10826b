"""Whether a run that goes on reads the text that it began with."""

from typing import Any

from moe_jax.config import ConfigError
from moe_jax.data.pipeline import TextData


def check_same_text(saved: dict[str, Any], data: TextData) -> list[str]:
    """Compares the text of a checkpoint with the one there is now, by content: folders may have moved.

    Args:
      saved: the checkpoint's description: `data_fingerprint`, and `text`, the `TextData.identity` of then (older
        ones have none).
      data: the text now.

    Returns:
      Warnings: one for each held-out text that differs, which changes scores but not the training.

    Raises:
      ConfigError: another training text, naming the first source and the splits that differ.
    """
    then, now = saved.get("text"), data.identity
    changed = changed_splits(then, now) if then else {}
    trained_on = [name for name, splits in changed.items() if "train" in splits]
    same = saved["data_fingerprint"] == data.fingerprint or (then and then["mixture"] == now["mixture"] and not trained_on)
    if same:
        return [
            f"the {split} text of {name} is not the checkpoint's: {change}; its scores from here on are of another text"
            for name, splits in changed.items()
            for split, change in splits.items()
        ]
    fix = "put the text back as it was, or use another --workdir"
    if not trained_on:
        names = ", ".join(name for name, *_ in now["mixture"]["sources"])
        limit = "the training text is not the one that the checkpoint was trained on"
        raise ConfigError("data.sources", names, limit, fix)
    name, splits = trained_on[0], changed[trained_on[0]]
    limit = "; ".join(f"{split} is not the checkpoint's: {change}" for split, change in splits.items())
    if trained_on[1:]:
        limit += f"; other text in {', '.join(trained_on[1:])} too"
    raise ConfigError(f"data.sources[{list(now['texts']).index(name)}]", name, limit, fix)


def changed_splits(then: dict[str, Any], now: dict[str, Any]) -> dict[str, dict[str, str]]:
    """{source: {split: what changed}} between two `TextData.identity`, of the splits that both have."""
    changed = {}
    for name, splits in now["texts"].items():
        for split, new in splits.items():
            old = then["texts"].get(name, {}).get(split)
            if old and old["content"] != new["content"]:
                counts = [f"{text['documents']:,} documents of {text['bytes']:,} bytes" for text in (old, new)]
                change = f"{counts[0]} then, {counts[1]} now" if counts[0] != counts[1] else f"{counts[0]}, but not the same"
                changed.setdefault(name, {})[split] = change
    return changed
