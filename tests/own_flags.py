"""Flags of one program at a time, in a process that runs several."""

import contextlib

from absl import flags

FLAGS = flags.FLAGS


@contextlib.contextmanager
def no_flags():
    """Takes away the flags that others have defined in this process, and gives them back."""
    home = FLAGS.find_module_defining_flag
    kept = {name: FLAGS[name] for name in FLAGS if not (home(name) or "").startswith("absl")}
    for name in kept:
        delattr(FLAGS, name)
    before = set(FLAGS)
    try:
        yield
    finally:
        # absl itself defines some, once, when the first program runs.
        new = [n for n in FLAGS if n not in before and not (home(n) or "").startswith("absl")]
        for name in new:
            delattr(FLAGS, name)
        for name, flag in kept.items():
            FLAGS[name] = flag
