"""The anchor of a model directory as it is on disk: what a trainer of that model exports before its first step."""

from rlorch.engine.model import load_model
from rlorch.engine.serving import bit_views, resolve_serve_dtype, serving_tensors
from rlorch.specs import Dtype
from rlorch.types import Manifest
from rlorch.weights.codec import encode_update


def encode_base_anchor(model_dir: str, dtype: Dtype = "auto", zstd_level: int = 1) -> tuple[Manifest, bytes]:
    """Version 0 as an anchor, and its payload.

    The model is loaded as the trainer loads it, in the dtype that is served: names, ties and layout are the
    checkpoint's, and rounding once from disk gives the bits that rounding from the trainer's float32 gives.

    Args:
        model_dir: a directory as `save_pretrained` writes it, or a hub id.
        dtype: what samplers serve (`TrainerSpec.serve_dtype`).
        zstd_level: of the payload.

    Raises:
        ModelError: it does not load. ConfigError: a dtype that is not served.
    """
    served = resolve_serve_dtype(dtype)
    _, model = load_model(model_dir, served)
    bits, dtypes = bit_views(serving_tensors(model, served))
    return encode_update(
        version=0, kind="anchor", base_version=None, base=None, new=bits, dtypes=dtypes, zstd_level=zstd_level
    )
