"""Run vLLM's V2 model runner, which needs Triton, on a CPU: its kernels are interpreted.

Python imports this at start in every process of `make test-vllm-v2`, which has this folder on the
path. vLLM looks for a CPU backend of Triton, which its wheels lack. The interpreter needs none.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

try:
    from triton.backends import backends
except ImportError:
    pass
else:

    class Interpreted:
        class driver:  # noqa: N801  Triton's name.
            @staticmethod
            def is_active() -> bool:
                return False  # For Triton and Inductor, which would request a device.

    backends.setdefault("cpu", Interpreted)
