"""Makes `import torchvision` work beside a CPU build of torch.

The wheel on PyPI is compiled against CUDA torch: its C++ operators do not load beside a CPU torch,
and torchvision then fails while it registers their shapes. Declaring the operators is enough, since
transformers' video processor uses none of them.
"""

import importlib
import importlib.util
import sys

OPERATORS = ("nms", "qnms")  # those that torchvision registers without looking whether they exist


def install() -> bool:
    """Imports torchvision, declaring its operators when needed; False when it is not installed.

    Call before transformers is imported, which looks for torchvision by itself.
    """
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        from torch import library

        for name in OPERATORS:
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            library.define(f"torchvision::{name}", schema)
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        importlib.import_module("torchvision")
    return True
