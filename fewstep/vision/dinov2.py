"""DINOv2 as an extractor: the features of FD-DINOv2."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fewstep.vision.clip import folder_sha256, load_network, local_folder
from fewstep.vision.extractor import Extractor, full_precision
from fewstep.vision.preprocess import normalised, pil_resize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the published models want it


class Dinov2(Extractor):
    """The class token after the last norm, of images squeezed to 224 x 224 with Pillow's bicubic.

    Oquab et al., arXiv 2304.07193; as a Fréchet distance in Stein et al., arXiv 2306.04675, with ViT-L/14.

    Args:
        source: folder with config.json and safetensors, or a hub id that is in the cache already.
        device: where the network runs; features come back on the CPU.

    Raises:
        FewstepError: not on disk, or not loadable.
    """

    size, resize = 224, "pil-bicubic-224"

    def __init__(self, source: str, device: str = "cpu"):
        from transformers import Dinov2Model

        folder = local_folder(source)
        self.model = load_network(Dinov2Model, folder, device)
        self.name, self.device = f"dinov2:{Path(source).name}", device
        self.dim = self.model.config.hidden_size
        squeeze = partial(pil_resize, size=self.size, method="bicubic")
        self.prepare = partial(normalised, crop=squeeze, mean=MEAN, std=STD)
        self.weights_sha256 = folder_sha256(folder)

    @torch.no_grad()
    def features(self, prepared: Tensor) -> Tensor:
        with full_precision():
            return self.model(prepared.to(self.device)).last_hidden_state[:, 0].float().cpu()
