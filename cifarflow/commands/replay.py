"""Runs a failed step again, from the capsule that its run left, and says what is not finite.

    cifarflow replay runs/first/capsules/step_00000041

Neither the data set nor the run's folder is needed.
"""

from __future__ import annotations

from cifarflow.errors import ConfigError


def define_flags() -> None:
    """Defines the flags: there are none."""


def main(words: list[str]) -> None:
    """Replays a capsule, and prints what was found then and what is found now.

    Args:
      words: the capsule's folder.

    Raises:
      ConfigError: if they are not one folder.
      CapsuleError: see `replay_capsule`.
    """
    if len(words) != 1 or not words[0].strip():
        raise ConfigError(f"replay must be given FOLDER, the capsule of one step, not {words!r}")
    # Loaded here: what is wrong with a word is said without waiting for TensorFlow.
    from cifarflow.replay import replay_capsule
    from cifarflow.training.capsule import load_capsule

    capsule = load_capsule(words[0])
    recipe = (capsule.recipe or {}).get("name")
    # A file's own words, so quoted: they may hold anything.
    print(
        f"step {capsule.step} of {recipe!r:.80}, seed {capsule.seed}, {len(capsule.labels)} images"
    )
    print(f"then: {capsule.found.describe()}")
    found = replay_capsule(capsule)
    print(f"now:  {found.describe()}")
    if found.is_sound != capsule.found.is_sound:
        print("it does not come out as it did: another device or version may round otherwise")
