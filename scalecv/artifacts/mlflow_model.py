"""A bundle as an MLflow model that `mlflow.pyfunc.load_model` opens, without pickle.

MLflow keeps the bundle's files and this module's name; `_load_pyfunc` opens them.
"""

import os
from typing import Any

REQUIRED = ("scalecv", "torch", "torchvision", "numpy")


def log_bundle(client: Any, bundle_dir: str, model_id: str, run_id: str) -> None:
    """Fill a logged model of a run with the folder of a bundle; takes well below 2 s.

    Requirements are passed, for MLflow would import the model in a fresh process to infer them.
    """
    from scalecv.artifacts import mlflow_client
    from scalecv.artifacts.provenance import versions

    mlflow = mlflow_client.quiet_mlflow()
    mlflow.set_tracking_uri(client.tracking_uri)
    installed = versions()
    mlflow.models.Model.log(
        artifact_path=None,
        flavor=mlflow.pyfunc,
        model_id=model_id,
        run_id=run_id,
        loader_module=__name__,
        data_path=os.path.abspath(bundle_dir),
        pip_requirements=[f"{p}=={installed[p]}" for p in REQUIRED if p in installed],
    )


class ImageModel:
    """A bundle behind `predict`, as MLflow expects it."""

    def __init__(self, bundle: Any) -> None:
        self.bundle = bundle

    def predict(self, images: Any, params: dict[str, Any] | None = None) -> Any:
        """Probabilities for images.

        Args:
            images: uint8 or float32 [B, H, W, C] or [B, C, H, W], in the value range of the training images.
            params: not used; MLflow passes it.
        Returns: float32 [B, K], for segmentation [B, K, H, W], for upscaling the larger images [B, C, H, W].
        Raises: DataError: another shape or number of channels.
        """
        import numpy as np
        import torch

        batch = torch.from_numpy(np.ascontiguousarray(self._channels_first(np.asarray(images))))
        with torch.inference_mode():
            logits = self.bundle.model(self._normalised(batch))
        if self.bundle.facts.task == "upscale":
            return self._in_units(logits).numpy()
        if logits.shape[1] == 1:
            return torch.sigmoid(logits).float().numpy()
        return torch.softmax(logits.float(), dim=1).numpy()

    def _channels_first(self, images: Any) -> Any:
        from scalecv.errors import DataError

        channels = self.bundle.facts.pixels.channels
        if images.ndim == 4 and images.shape[1] == channels:
            return images
        if images.ndim == 4 and images.shape[3] == channels:
            return images.transpose(0, 3, 1, 2)
        raise DataError(
            f"images have shape {list(images.shape)}; this model expects [B, H, W, {channels}] or [B, {channels}, H, W]"
        )

    def _normalised(self, batch: Any) -> Any:
        mean, std = self._moments()
        return (batch.float() - mean) / std

    def _in_units(self, images: Any) -> Any:
        mean, std = self._moments()
        return images.float() * std + mean

    def _moments(self) -> Any:
        import torch

        seen = self.bundle.facts.pixels
        return (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (seen.mean, seen.std))


def _load_pyfunc(path: str) -> ImageModel:
    """Open the bundle that MLflow fetched; called by `mlflow.pyfunc.load_model`."""
    from scalecv.artifacts.bundle import open_bundle

    return ImageModel(open_bundle(path))
