"""TensorFlow for modules that most of the time need none of it.

    from cifarflow.lazy import tf

    tf.zeros([3])                                   # loaded here, once

To load TensorFlow takes seconds, and whoever lists the recipes or has mistyped a flag need not
wait for it.  So the modules that a `Recipe` is made of do not load it before they use it; all
others `import tensorflow as tf` as usual.
"""

from __future__ import annotations

import importlib
from typing import Any


class LazyModule:
    """A module that is loaded when an attribute of it is asked for.

    Args:
      name: the module's full name.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


tf: Any = LazyModule("tensorflow")
