"""The side of the vLLM backends that runs in vLLM's processes.

`CoReWorkerExtension` is imported on first use: users' engines name it by this module.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"extension": ["CoReWorkerExtension"]}
)
